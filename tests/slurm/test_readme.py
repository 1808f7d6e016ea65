"""The README, done: every command in it runs as it stands there, in its order, in one home, on the real Slurm.

`selene` is here a profile of the sandbox under that name, the hub a server on this machine with a small Mixtral.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import metadata
from pathlib import Path

import pytest
import yaml
from fake_hub import serving

from megatron_mixtral.jobs.tiny import make
from megatron_mixtral.spec.jobs import TinyConfig

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.S | re.M)
COMMANDS = [
    line[2:] for kind, text in BLOCKS if kind == "console" for line in text.splitlines() if line[:2] == "$ "
]
REPO = "mistralai/Mixtral-8x7B-v0.1"
# Run by a test of their own, which says so in these words.
ELSEWHERE = {
    "make demo": "tests/test_demo.py",
    "make test": ".ci/run",
    "mixlaunch rehearse finetune --cluster selene --nodes 4": "tests/slurm/test_rehearse.py",
    "mixlaunch pipeline chats.jsonl --cluster selene --nodes 4": "tests/slurm/test_pipeline.py",
}
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": str(2 * n)},
        ]
    }
    for n in range(50_000)  # packed into sequences of 4096 tokens, more than one batch of them
]


class Reader:
    """Somebody with the README, a shell and an account on selene."""

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.environment = environment

    def types(
        self,
        command: str,
        *,
        code: int = 0,
        cwd: Path | None = None,
        seconds: float = 300,
        stdin: str = "",
        **more: str,
    ) -> str:
        """What the command prints; its exit code must be `code`."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=cwd or self.home,
            env=self.environment | more,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
        assert done.returncode == code, f"$ {command}\n{done.stdout}\nended with {done.returncode}"
        assert "Traceback" not in done.stdout
        return done.stdout

    def follows(self, command: str, until: str, seconds: float = 400) -> None:
        """Watch a command that doesn't end by itself until it prints `until`, then leave it."""
        shell = ["timeout", str(seconds), "bash", "-c", f"exec {command}"]
        process = subprocess.Popen(shell, cwd=self.home, env=self.environment, stdout=subprocess.PIPE, text=True)
        seen = []
        try:
            for line in process.stdout:
                seen.append(line)
                if until in line:
                    return
            raise AssertionError(f"$ {command}\n{''.join(seen)}\nnever said {until!r} in {seconds} s")
        finally:
            process.terminate()
            process.wait()

    def state(self, job: str) -> str:
        """The state of the newest run of `job`, from the table that `status` prints."""
        rows = [line.split() for line in self.types("mixlaunch status").splitlines()]
        return next(row[4] for row in rows if row[1] == job)

    def waits(self, job: str, state: str, seconds: float = 400) -> None:
        """Until the newest run of `job` is in `state`."""
        deadline = time.monotonic() + seconds
        while (now := self.state(job)) != state:
            told = f"mixlaunch logs {job}; mixlaunch logs --batch {job}"
            assert now in ("PENDING", "RUNNING", "COMPLETING"), f"{job} is {now}\n{self.types(told)}"
            assert time.monotonic() < deadline, f"{job} is {now} after {seconds} s\n{self.types(told)}"
            time.sleep(2)  # a look takes half a second of a core


@pytest.fixture
def short_path():
    """A folder whose path is as short as a home's: Slurm's sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="home", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def reader(site, short_path):
    """A home with selene's profile and something to train on; PATH has this environment's programs first."""
    (short_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in CHATS))
    clusters = short_path / ".config" / "mixlaunch" / "clusters"
    clusters.mkdir(parents=True)
    (short_path / "shared" / "models").mkdir(parents=True)  # the cluster has it; nobody makes /lustre by a slip
    (clusters / "selene.yaml").write_text(yaml.safe_dump(selene(site, short_path)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MIXLAUNCH_", "SLURM_", "XDG_"))}
    environment |= {"HOME": str(short_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    shape = {"layers": 4, "hidden": 64, "intermediate": 64, "heads": 4, "kv_heads": 2}
    shape["max_positions"] = 512  # where its answers end, as random words have no end
    make(TinyConfig(output=str(short_path / "hub"), **shape))
    files = {path.name: path.read_bytes() for path in (short_path / "hub").iterdir()}
    with serving(files, repository=REPO) as hub:
        yield Reader(short_path, environment | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"})


def selene(site, home: Path) -> dict:
    """Selene as it is, but for what only its own nodes have: adapters, images, paths, cores."""
    profile = yaml.safe_load((ROOT / "clusters" / "selene.yaml").read_text())
    return profile | {
        "partition": "low",
        "slurm_conf": str(site.slurm_conf),
        "node": {**profile["node"], "cpus": 64, "memory_gb": 512},
        "container": {"runtime": "none"},
        "binding": {},
        "python": sys.executable,
        "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1},
        "paths": {name: str(home / "shared" / name) for name in ("models", "data", "runs")},
        "serve": {"host": "127.0.0.1", "port": 5000},
        "signal_lead": 30,
    }


def leave(job: str):
    """What is done after a command that submits `job`: it runs to its end before the next command."""
    return lambda reader, command: (reader.types(command), reader.waits(job, "COMPLETED"))


def chats(reader: Reader, command: str) -> None:
    """Once the server is ready; on four nodes it waited for finetune's to be free."""
    deadline = time.monotonic() + 180
    while not re.search(r"^serve-\S+ .* ready ", reader.types("mixlaunch status"), re.M):
        assert time.monotonic() < deadline, reader.types("mixlaunch logs serve; mixlaunch status")
        time.sleep(2)
    reader.types(command, stdin="What is 1 and 1?")


def fresh(reader: Reader, command: str) -> None:
    """In a virtual environment of its own, from the source."""
    folder = reader.home / "fresh"
    if not folder.exists():
        venv.create(folder, with_pip=True)
    constraints = f"{ROOT / 'constraints.txt'} {ROOT / 'constraints-cpu.txt'}"
    path = f"{folder / 'bin'}:{reader.environment['PATH']}"
    reader.types(command, cwd=ROOT, seconds=300, PATH=path, PIP_CONSTRAINT=constraints)
    script = reader.types("mixlaunch export finetune --cluster selene --nodes 4", PATH=path)
    assert script.startswith("#!/bin/bash")
    missing = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is not None)"
    reader.types(f'python -c "{missing}"', PATH=path)  # a login node needs no torch


def extra(reader: Reader, command: str) -> None:
    """`make` put the extra's packages here, from the same setup.cfg; gigabytes aren't fetched twice."""
    assert "serve" in metadata("mixlaunch").get_all("Provides-Extra"), command


def stands_on(reader: Reader, command: str) -> None:
    """On selene's login node Slurm's commands need no telling; what is written is a profile that passes."""
    conf = yaml.safe_load((reader.home / ".config" / "mixlaunch" / "clusters" / "selene.yaml").read_text())
    reader.types(command, SLURM_CONF=conf["slurm_conf"])
    reader.types("mixlaunch clusters check ours")


# Commands that aren't done when they return, or want more than a shell around them.
HOW = {
    f"mixlaunch download {REPO} --cluster selene": lambda r, c: r.types(c),
    "mixlaunch convert --cluster selene --preset train": leave("convert"),
    "mixlaunch convert verify --cluster selene": leave("verify"),
    "mixlaunch convert --cluster selene --layout legacy --ep 2 --pp 2 --check-logits": leave("convert"),
    f"mixlaunch convert --cluster selene --to hf --model {REPO}": leave("convert"),
    "mixlaunch prepare chats.jsonl --cluster selene": leave("prepare"),
    "mixlaunch finetune --cluster selene --nodes 4": lambda r, c: (r.types(c), r.waits("finetune", "RUNNING")),
    "mixlaunch serve --cluster selene": lambda r, c: r.follows(c, "cancel"),  # it would wait for finetune's nodes
    "mixlaunch chat serve": chats,
    "mixlaunch logs -f finetune": lambda r, c: r.follows(c, "32 ranks"),
    "mixlaunch resume finetune": lambda r, c: (r.types(c), r.types("mixlaunch cancel finetune")),
    "mixlaunch finetune --cluster selene --nodes 3": lambda r, c: r.types(c, code=2),
    "mixlaunch clusters new ours": stands_on,
    "pip install .": fresh,
    "pip install '.[serve]'": extra,
}


@pytest.mark.many_ranks
@pytest.mark.timeout(1200)
def test_every_command_in_the_readme(reader):
    profile = next(text for kind, text in BLOCKS if kind == "yaml")
    (reader.home / ".config" / "mixlaunch" / "clusters" / "mine.yaml").write_text(profile)
    for command in COMMANDS:
        if command in ELSEWHERE:
            assert command in (ROOT / ELSEWHERE[command]).read_text(), f"nothing runs `{command}`"
        else:
            HOW.get(command, Reader.types)(reader, command)
