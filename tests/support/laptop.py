"""A laptop without Slurm, and the cluster that it reaches over a real sshd.

Touching the cluster's folders otherwise than over ssh is an error there.
"""

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import sshd
import yaml

from launcher.host import ssh
from launcher.runs import find, record
from launcher.slurm import client

REASON = "needs openssh-server and rsync; on Debian: apt-get install openssh-server rsync"


# What the laptop's Python refuses: everything below the cluster's folder, as if it weren't there.
AWAY = """
import os, sys
far = os.environ["TEST_FAR_AWAY"]
def refuse(path):
    if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(far):
        raise AssertionError(f"the laptop touched {path}")
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        refuse(arguments[0])
sys.addaudithook(hook)
stat = os.stat
os.stat = lambda path, *a, **k: (refuse(path), stat(path, *a, **k))[1]
from launcher.cli.main import main
main()
"""


PROGRAMS = ("ssh", "rsync", "bash")


@dataclass
class Screen:
    """What a terminal shows."""

    descriptor: int

    def until(self, text: str, seconds: float = 20) -> str:
        shown, deadline = "", time.monotonic() + seconds
        while text not in shown:
            assert select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(self.descriptor, 4096).decode()
        return shown

    def types(self, line: str) -> None:
        os.write(self.descriptor, f"{line}\n".encode())


class Laptop:
    """A home with a profile of the cluster behind `server`, and the commands typed there."""

    def __init__(self, home: Path, server: sshd.Server, far: Path, slurm_conf: Path) -> None:
        self.home, self.server, self.far = home, server, far
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        for program in PROGRAMS:
            (self.bin / program).symlink_to(shutil.which(program))
        self.profile = {
            "scheduler": "slurm",
            "slurm_conf": str(slurm_conf),
            "time": "10",
            "node": {"gpus": 2, "cpus": 64, "memory_gb": 512},
            "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            "paths": {name: str(far / name) for name in ("models", "data", "runs")},
            "signal_lead": 30,
            "login": {"host": "127.0.0.1", "options": server.options},
        }
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "MIXLAUNCH_CLUSTERS": str(home / "clusters"),
            "MIXLAUNCH_CLUSTER": "far",
            "TEST_FAR_AWAY": str(far),
            "TERM": "dumb",
        }
        self.change()

    def change(self, **more) -> None:
        """Write the profile, with `more` in it."""
        self.profile |= more
        (self.home / "clusters").mkdir(exist_ok=True)
        (self.home / "clusters" / "far.yaml").write_text(yaml.safe_dump(self.profile))

    def start(self, *words: str) -> subprocess.Popen:
        argv, pipe = [sys.executable, "-c", AWAY, *words], subprocess.PIPE
        how = {"cwd": self.home, "env": self.environment, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(argv, stdout=pipe, stderr=pipe, **how)

    @contextlib.contextmanager
    def terminal(self, *words: str):
        """A command on a terminal of its own."""
        pid, descriptor = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            os.execve(sys.executable, [sys.executable, "-c", AWAY, *words], self.environment)
        try:
            yield Screen(descriptor)
        finally:
            os.close(descriptor)
            os.waitpid(pid, 0)

    def types(self, *words: str, code: int = 0, seconds: float = 60) -> str:
        """What `mixlaunch WORDS` prints; it ends with `code`."""
        process = self.start(*words)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, f"{' '.join(words)} ended with {process.returncode}\n{out}{err}"
        assert "Traceback" not in err
        return out + err

    def trains(self, *more: str, **how) -> str:
        """Submit a finetune of two ranks on one node."""
        return self.types(*self.training, *more, **how)

    @property
    def training(self) -> tuple[str, ...]:
        return ("finetune", "--model", f"{self.far}/models/m", "--pp", "1", "--ep", "2")

    def copies(self) -> list[Path]:
        """Run directories that this laptop knows of."""
        return [path.parent for path in (self.home / "state").rglob("run.json")]

    def there(self) -> list[record.Run]:
        """The runs as they are on the cluster, newest first."""
        return find.every([self.far / "runs"])


@pytest.fixture
def far(tmp_path):
    """The cluster's shared folder."""
    folder = tmp_path / "cluster"
    for name in ("models/m", "data", "home", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "finetune.idx").touch()
    return folder


@pytest.fixture
def server(tmp_path, far):
    """Over there PATH has a folder of the test's own first, and no start-up file of this machine's user counts."""
    variables = {"HOME": str(far / "home"), "PATH": f"{far / 'bin'}:{os.environ['PATH']}"}
    with sshd.running(tmp_path / "sshd", variables) as running:
        yield running


@pytest.fixture
def laptop(tmp_path, server, far, site, stub, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    made = Laptop(tmp_path / "laptop", server, far, site.slurm_conf)
    made.change(python=stub("echo rank $RANK"))
    yield made
    with contextlib.suppress(ssh.Fault):
        ssh.close(server.login)


def jobs_of(site, run: record.Run) -> list[str]:
    return [job.id for job in client.queue(site.host).values() if job.command == str(run.path / "job.sbatch")]


def configure(laptop: Laptop, text: str) -> None:
    """Give the laptop's user a configuration of ssh, which by itself looks in the real home only."""
    (laptop.home / "config").write_text(text)
    (laptop.bin / "ssh").unlink()
    (laptop.bin / "ssh").write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {laptop.home}/config "$@"\n')
    (laptop.bin / "ssh").chmod(0o755)


def replace(laptop: Laptop, program: str, does: str) -> None:
    """Put a script in a program's place on the login node; the real one is "$REAL"."""
    path = laptop.far / "bin" / program
    path.write_text(f"#!/bin/bash\nREAL={shutil.which(program)}\n{does}\n")
    path.chmod(0o755)


# Ends the connection that it runs under, as a network or a laptop's lid does.
CUT = """
pid=$$
while :; do
  case $(cat /proc/$pid/comm) in sshd*) break ;; esac
  pid=$(sed 's/.*) [A-Z] //' /proc/$pid/stat | cut -d' ' -f1)
done
kill -KILL "$pid"
sleep 0.3"""
