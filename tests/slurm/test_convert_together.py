"""Four nodes of a real Slurm convert one model together; one is lost half-way, and the next attempt finishes."""

import sys
import time
from pathlib import Path

import pytest
from running import rank_logs, story, wait_until

from launcher.common import processes
from launcher.planning import jobs
from launcher.runs import logs
from launcher.submit import start
from megatron_mixtral.jobs import convert as converter
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import hub
from megatron_mixtral.weights.copying import Target
from megatron_mixtral.weights.tensors import hub_shapes

SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "intermediate_size": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 67,
}
# Killed as by a node's end, with its second file half written.
DIES = """
import os, pathlib, signal, sys, time
from megatron_mixtral import __main__
from megatron_mixtral.weights.copying import Copier
from megatron_mixtral.spec import rundir
write, files = Copier.write, []
def once(self, unit, descriptor):
    files.append(unit)
    if len(files) == 2:
        folder = pathlib.Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent
        while not any(folder.glob("*.distcp")):  # until there is a finished file to be kept
            time.sleep(0.05)
        os.write(descriptor, b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, unit, descriptor)
Copier.write = once
sys.exit(__main__.main(sys.argv[sys.argv.index("megatron_mixtral") + 1:]))
"""


@pytest.fixture
def model(tmp_path):
    """A hub folder of some 20 MB of noise: about 20 files to write."""
    import json
    import os

    folder = tmp_path / "models" / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    shapes = hub_shapes(MixtralShape.from_hf(SHAPE))
    (unit,) = hub.shards([Target(n, (0,) * len(s), s, "bfloat16", ()) for n, s in shapes.items()], limit=10**9)
    (folder / unit.file).write_bytes(hub.header(unit.targets) + os.urandom(unit.nbytes))
    return folder


@pytest.fixture
def four_nodes(cluster, model, tmp_path):
    """Plan the conversion by one process on each of four nodes; `python` takes Python's place."""

    def make(python: str = sys.executable, **more) -> jobs.JobPlan:
        return jobs.plan_convert(
            cluster.model_copy(update={"python": python}),
            model=str(model),
            output=str(tmp_path / "models" / "out"),
            processes=1,
            ask=jobs.Ask(nodes=4),
            **more,
        )

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def undisturbed(model: Path, folder: Path) -> dict[str, bytes]:
    """What one process on its own writes."""
    converter.run(ConvertConfig(source=str(model), output=str(folder)), folder.parent)
    return contents(folder)


def kept(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.distcp")}


def test_a_lost_rank_fails_the_job_at_once_and_the_requeued_job_finishes_it(
    four_nodes, stub, finish, model, tmp_path
):
    (tmp_path / "dies.py").write_text(DIES)
    out, python = tmp_path / "models" / "out", sys.executable
    lost = f'[ "$RANK" != 2 ] || [ "$MIXLAUNCH_ATTEMPT" != 0 ] || exec {python} {tmp_path}/dies.py "$@"'
    # The second attempt waits until the test has seen what the first one left.
    waits = f'while [ "$MIXLAUNCH_ATTEMPT" = 1 ] && [ ! -e {tmp_path}/go ]; do sleep 0.1; done'
    run = start.run(four_nodes(stub(f'{lost}; {waits}; exec {python} "$@"')))
    wait_until(lambda: logs.attempts(run.path) == [0, 1], 60, run)
    assert not out.exists()
    before = kept(out.with_name("out.partial"))
    assert before
    (tmp_path / "go").touch()
    assert finish(run).state == "COMPLETED", story(run)
    said = logs.path(run.path, 0, "batch").read_text()
    assert "rank 2 on sandbox2 was the first to leave, with 137" in said
    assert "requeued" in said
    assert contents(out) == undisturbed(model, tmp_path / "alone")
    again = [name for name in before if kept(out)[name] != before[name]]
    assert not again, "files that were finished are not written twice"
    shares = [log.count(" of ") for log in rank_logs(run, 1)]
    assert all(shares), "each of the four nodes took part"
    assert not out.with_name("out.partial").exists()


@pytest.mark.soak
def test_a_job_that_is_told_to_leave_does_so_between_two_files_and_goes_on_later(
    four_nodes, stub, finish, model, tmp_path
):
    """Rank 3 is so slow to start that it misses the warning: the others, done with their part, leave it a note."""
    hold = f'[ "$RANK$MIXLAUNCH_ATTEMPT" != 30 ] || while [ ! -e {tmp_path}/go ]; do sleep 0.1; done'
    run = start.run(four_nodes(stub(f'{hold}; exec {sys.executable} "$@"')))
    partial = tmp_path / "models" / "out.partial"
    wait_until(lambda: len(list(partial.glob(".work/*.distcp.json"))) >= 10, 60, run)
    time.sleep(1)
    run.host.call("scancel", "--signal=USR2", "--batch", run.job_id)
    wait_until(lambda: "asked to stop" in rank_logs(run)[0], 30, run)
    (tmp_path / "go").touch()
    assert finish(run, 90).state == "COMPLETED", story(run)
    assert "everything is saved; requeued" in logs.path(run.path, 0, "batch").read_text()
    assert contents(tmp_path / "models" / "out") == undisturbed(model, tmp_path / "alone")
    assert (tmp_path / "models" / "out" / "release" / rundir.MARKER).exists()
    wait_until(lambda: not processes.marked(SLURM_JOB_ID=run.job_id), 15, run)
