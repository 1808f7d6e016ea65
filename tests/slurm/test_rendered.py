"""Rendered scripts on the real Slurm: values arrive as they were given, and plain sbatch is enough."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from hostile_texts import CANARY, CARRIED
from running import wait_until

from launcher.cluster import catalog, profile
from launcher.host.local import Local
from launcher.planning import jobs
from launcher.sandbox import lifecycle
from launcher.sandbox.config import ClusterShape
from launcher.script import bundle, render
from launcher.submit import start


@pytest.fixture
def sbatch(site, tmp_path):
    """sbatch as a user types it, in a folder of its own; what it printed."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()

    def submit(text: str, *options: str) -> str:
        script = folder / "script.sh"
        script.write_text(text)
        done = subprocess.run(
            ["sbatch", *options, script.name],
            cwd=folder,
            env={**os.environ, **site.host.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return submit


def test_hostile_values_arrive_intact_in_the_running_job(cluster, stub, finish, tmp_path):
    environment = {f"V{index}": value for index, value in enumerate(CARRIED)}
    changed = {"python": stub('env -0 >"$MIXLAUNCH_RUN/env"'), "environment": environment}
    files = tuple(str(tmp_path / value.replace("/", "_")) for value in CARRIED if len(value) < 200)
    plan = jobs.plan_prepare(
        cluster.model_copy(update=changed), files=files, values={"text_key": "$(touch canary)"}
    )
    run = start.run(plan)
    assert finish(run).state == "COMPLETED"
    arrived = dict(item.split("=", 1) for item in (run.path / "env").read_text().split("\0") if "=" in item)
    assert {name: arrived[name] for name in environment} == environment
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    assert config["inputs"] == [os.path.normpath(f) for f in files]
    assert config["text_key"] == "$(touch canary)"
    assert not list(tmp_path.rglob(CANARY))


@pytest.mark.parametrize("value", [v for v in CARRIED if v.strip() == v], ids=lambda v: ascii(v)[:30])
def test_hostile_words_of_a_directive_arrive_intact(cluster, sbatch, site, value):
    plan = jobs.plan_prepare(cluster.model_copy(update={"comment": value}), files=("/a",))
    job = sbatch(render.render(plan), "--hold").split()[3]
    try:
        shown = site.host.call("scontrol", "--oneliner", "show", "job", job)
        assert f" Comment={value} " in shown
        assert " NumNodes=1" in shown
    finally:
        site.host.call("scancel", job)


def test_an_exported_script_needs_plain_sbatch_and_nothing_else(plan, stub, sbatch, site, tmp_path):
    text = render.render(plan(stub('echo "$RANK of $WORLD_SIZE"; cat "$MIXLAUNCH_RUN/config.yaml"')))
    job = sbatch(text).split()[3]
    run = tmp_path / "runs" / f"finetune-{job}"
    log = run / "logs" / "attempt_0" / "batch.log"
    wait_until(lambda: log.exists() and "done; exit 0" in log.read_text(), 60)
    for rank in range(4):
        said, *config = (run / "logs" / "attempt_0" / f"rank_{rank}.log").read_text().splitlines(keepends=True)
        assert said == f"{rank} of 4\n"
        assert "".join(config) == (run / "config.yaml").read_text()


def test_a_bundle_runs_by_plain_sbatch_in_its_folder(plan, stub, site, tmp_path):
    """What its config.yaml says is what the ranks read, changed by hand or not."""
    made = tmp_path / "made"
    bundle.write(plan(stub('cat "$MIXLAUNCH_RUN/config.yaml"')), made, asked=["export", "it's"])
    assert {path.name for path in made.iterdir()} == {"job.sbatch", "config.yaml", "README.md"}
    assert "$ sbatch job.sbatch" in (made / "README.md").read_text()
    config = (made / "config.yaml").read_text() + "steps: 7\n"
    (made / "config.yaml").write_text(config)

    def submitted(script: str, folder: Path) -> tuple[Path, Path]:
        said = site.host.call("env", "-C", str(folder), "sbatch", script)
        run = tmp_path / "runs" / f"finetune-{said.split()[3]}"
        return run, run / "logs" / "attempt_0" / "batch.log"

    run, log = submitted("job.sbatch", made)
    wait_until(lambda: log.exists() and "done; exit 0" in log.read_text(), 60)
    assert (run / "config.yaml").read_text() == config
    assert (run / "logs" / "attempt_0" / "rank_3.log").read_text() == config
    _, elsewhere = submitted("made/job.sbatch", tmp_path)
    wait_until(
        lambda: elsewhere.exists() and "run sbatch in the folder that holds both" in elsewhere.read_text(), 60
    )


@pytest.fixture
def mirror(tmp_path_factory):
    """A sandbox in a profile's own geometry; what its Slurm's commands need."""
    up = []

    def make(cluster: profile.ClusterProfile) -> Local:
        shape = ClusterShape(
            gpus=cluster.node.gpus,
            gpu_type=cluster.node.gpu_type or "",
            cpus=cluster.node.cpus or 64,
            memory_gb=cluster.node.memory_gb or 512,
            nodes=max(4, 32 // max(1, cluster.node.gpus)),
            partitions=((cluster.partition or "batch", 1),),
            accounts=(cluster.account,) if cluster.account else (),
            qos=(cluster.qos,) if cluster.qos else (),
            features=tuple((cluster.constraint or "").split("&")) if cluster.constraint else (),
        )
        accounting = None if shape.accounts or shape.qos else False
        up.append(lifecycle.up(tmp_path_factory.mktemp("mirror"), shape, accounting=accounting))
        return up[-1].host

    yield make
    for made in up:
        lifecycle.down(made.folder)


ASKED = {
    "tiny": {"output": "/x"},
    "download": {},
    "prepare": {"files": ("/x",)},
    "convert": {"preset": "train"},
    "verify": {},
    "finetune": {},
    "serve": {},
    "serve by vllm": {"values": {"engine": "vllm"}},
}


@pytest.mark.parametrize("name", [n for n in catalog.available() if n != "local"])
def test_sbatch_accepts_every_job_of_every_cluster_in_its_own_geometry(name, site, mirror, tmp_path):
    cluster = profile.load(name)
    host = site.host if name == "sandbox" else mirror(cluster)
    assert {case.split()[0] for case in ASKED} == set(jobs.PLANS)
    for job, asked in ASKED.items():
        script = tmp_path / f"{job}.sh"
        script.write_text(render.render(jobs.PLANS[job.split()[0]](cluster, **asked)))
        done = subprocess.run(
            ["sbatch", "--test-only", str(script)],
            env={**os.environ, **host.environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{job}: {done.stderr}"
