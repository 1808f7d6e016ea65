"""Ends that Slurm takes its time for, on a sandbox of their own: memory limits hold there, and nodes may die."""

import dataclasses
import os
import signal
import sys

import pytest
from running import wait_until

from launcher.common import processes
from launcher.diagnose import explain
from launcher.runs import logs, record, states
from launcher.sandbox import lifecycle
from launcher.submit import start

pytestmark = pytest.mark.soak
GROW = """
import os, time
kept = b"x" * (1200 << 20) if os.environ["RANK"] == "1" else b""
time.sleep(60)
"""


@pytest.fixture(scope="module")
def rough(tmp_path_factory):
    """Memory is looked at every second and a node that says nothing is down after ten."""
    up = lifecycle.up(tmp_path_factory.mktemp("rough"))
    text = up.slurm_conf.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("JobAcctGatherFrequency")]
    more = ["JobAcctGatherFrequency=task=1", "JobAcctGatherParams=OverMemoryKill", "SlurmdTimeout=10", ""]
    up.slurm_conf.write_text("\n".join([*kept, *more]))
    up.host.call("scontrol", "reconfigure")
    yield up
    lifecycle.down(up.folder)


@pytest.fixture
def started(plan, rough, cluster):
    def begin(python: str, **more) -> record.Run:
        made = plan(python, slurm_conf=str(rough.slurm_conf), **more)
        return start.run(dataclasses.replace(made, resumable=False))

    return begin


def test_more_memory_than_was_asked_for(started, stub, finish, cluster):
    run = started(
        stub(GROW, sys.executable), node=cluster.node.model_copy(update={"gpus": 2, "cpus": 8, "memory_gb": 1})
    )
    finish(run, 90)
    found = explain.explain(run).finding
    first = logs.path(run.path, 0, logs.BATCH).read_text().split(" ranks on sandbox[")[1][0]
    assert (found.cause.name, found.nodes) == ("memory_limit", (f"sandbox{first}",))


def test_bad_nodes_without_end(plan, stub, finish, cluster):
    """Whoever came back three times comes back no more."""
    sick = (
        f'case "$*" in *.health*) [ "$SLURMD_NODENAME" != sandbox1 ] || exit 1; exec {sys.executable} "$@";; esac'
    )
    run = start.run(plan(stub(sick), health_check=True, extra={"hold": True}))
    (run.path / "came_back").write_text("sandbox3\n" * 3)
    run.host.call("scontrol", "release", run.job_id)
    assert finish(run, 90).state == "FAILED"
    found = explain.explain(run).finding
    assert (found.cause.name, found.nodes) == ("health_check", ("sandbox1",))
    assert "it came back from bad nodes three times before" in logs.path(run.path, 0, logs.BATCH).read_text()


def test_the_time_limit(started, stub, finish):
    run = started(stub("sleep 300"), limit="1", signal_lead=10)
    assert finish(run, 150).state == "TIMEOUT"
    assert explain.explain(run).finding.cause.name == "time_limit"


def test_a_node_that_dies(started, stub, finish, rough):
    """Its slurmd and everything below it are gone at once, as when the power fails."""
    run = started(stub("exec sleep 300"))
    wait_until(lambda: len(logs.ranks(run.path, 0)) == 4 if logs.attempts(run.path) else False, 60, run)
    nodes = explain.hostlist.expand(states.of_run(run).nodes)
    daemon = rough.processes[nodes[1]]
    steps = [pid for pid in processes.marked(SLURM_JOB_ID=run.job_id, SLURMD_NODENAME=nodes[1])]
    for pid in [daemon, *processes.descendants([daemon]), *steps]:
        os.kill(pid, signal.SIGKILL)
    finish(run, 150)
    told = explain.explain(run)
    assert told.finding.cause.name in ("node_failure", "node_lost"), told  # whoever notices first
    assert list(told.bad_nodes) == [nodes[1]]
