"""However a test run ends, the sandbox and the ranks that its tests started end with it: /proc tells."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.common import processes
from launcher.sandbox import lifecycle

SUPPORT = Path(__file__).parent / "support"
# Two ranks that don't listen to SIGTERM, and where there is a Slurm, a sandbox with a job on it.
TESTS = """
import os, signal, time
from pathlib import Path
from launcher.sandbox import lifecycle
from launcher.sandbox.config import ClusterShape
from launcher.slurm import client
from spawn_ranks import ranks

def rank(folder):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(folder, "rank" + os.environ["RANK"]).write_text(str(os.getppid()))
    time.sleep(600)

def test_that_is_never_done(tmp_path):
    if not lifecycle.missing_packages():
        site = lifecycle.up(tmp_path / "sandbox", ClusterShape(nodes=1), accounting=False)
        script = "trap '' TERM; touch $STARTED/job; sleep 600 & wait"
        site.host.call("sbatch", f"--wrap={script}")
    ranks(2, rank, os.environ["STARTED"], timeout=600)
"""


@pytest.fixture
def run(tmp_path):
    """A pytest of one worker, in a process group of its own as from a terminal, once all it starts is there."""
    (tmp_path / "test_inner.py").write_text(TESTS)
    options = ["-p", "xdist", "-n", "1", "-p", "end_with_pytest", "-p", "no:cacheprovider"]
    variables = {"PYTHONPATH": str(SUPPORT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "STARTED": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", str(tmp_path)],
        env=os.environ | variables,
        cwd=tmp_path,
        stdout=(tmp_path / "output").open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    ready = ["rank0", "rank1", *([] if lifecycle.missing_packages() else ["job"])]
    while not all((tmp_path / name).exists() for name in ready):
        assert process.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return process


@pytest.fixture
def started(tmp_path):
    """Finds all that the run started, by a variable of this test's own."""
    yield lambda: processes.marked(STARTED=str(tmp_path))
    processes.stop(lambda: processes.marked(STARTED=str(tmp_path)), grace=0)


ENDS = {
    "ctrl_c": lambda run, worker: os.killpg(run.pid, signal.SIGINT),
    "sigterm": lambda run, worker: run.terminate(),
    "sigkill": lambda run, worker: run.kill(),
    "worker_killed": lambda run, worker: os.kill(worker, signal.SIGKILL),
}


@pytest.mark.parametrize("end", ENDS)
def test_nothing_is_left(end, started, run, tmp_path):
    # Two pytests, their watchers and two ranks; munged, slurmctld, slurmd and the job.
    assert len(started()) >= (6 if lifecycle.missing_packages() else 10)
    ENDS[end](run, int((tmp_path / "rank0").read_text()))
    run.wait(60)
    assert not processes.wait(started, 30), (tmp_path / "output").read_text()
