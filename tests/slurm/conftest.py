"""One real Slurm for all tests here: four nodes of eight pretended GPUs, as `mixlaunch sandbox up` makes it.

Without Slurm's daemons every test here is skipped, and the reason says how to get them.
"""

import getpass
import secrets
from pathlib import Path

import pytest
from laptop import far, laptop, server  # noqa: F401 - fixtures of the tests over ssh
from running import wait_until

from launcher.cluster.profile import ClusterProfile
from launcher.planning import jobs
from launcher.runs import record, states
from launcher.sandbox import lifecycle

INSTALL = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge slurmdbd mariadb-server"


def pytest_collection_modifyitems(items):
    missing = lifecycle.missing_packages()
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)
            if missing:
                item.add_marker(pytest.mark.skip(reason=f"Slurm's daemons aren't installed; on Debian: {INSTALL}"))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """No profile, state or setting of the machine leaks in."""
    for name in ("MIXLAUNCH_CLUSTER", "MIXLAUNCH_CLUSTERS", "MIXLAUNCH_SANDBOX", "XDG_CONFIG_HOME", "SLURM_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The sandbox that is up for the whole session."""
    folder = tmp_path_factory.mktemp("slurm")
    yield lifecycle.up(folder)
    lifecycle.down(folder)


@pytest.fixture
def stub(tmp_path):
    """Make an executable that takes Python's place on every rank: what a rank does is told in bash or Python."""

    def make(does: str, interpreter: str = "/bin/bash") -> str:
        path = tmp_path / f"rank{secrets.token_hex(2)}"
        path.write_text(f"#!{interpreter}\n{does}\n")
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def cluster(site, tmp_path):
    """The profile of the sandbox with folders of this test's own."""
    for name in ("models/m", "data", "runs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "data" / "d.idx").touch()
    return ClusterProfile.model_validate(
        {
            "name": "sandbox",
            "scheduler": "slurm",
            "time": "10",
            "node": {"gpus": 8, "cpus": 64, "memory_gb": 512},
            "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            "paths": {name: str(tmp_path / name) for name in ("models", "data", "runs")},
            "slurm_conf": str(site.slurm_conf),
            "serve": {"host": "127.0.0.1"},
            "signal_lead": 30,
        }
    )


@pytest.fixture
def plan(cluster, tmp_path):
    """Plan a finetune of four ranks on two nodes; `does` is what each rank does, `more` goes into the profile."""

    def make(python: str, *, nodes: int = 2, limit: str | None = None, **more) -> jobs.JobPlan:
        profile = cluster.model_copy(
            update={"python": python, "node": cluster.node.model_copy(update={"gpus": 2}), **more}
        )
        return jobs.plan_finetune(
            profile,
            model=str(tmp_path / "models" / "m"),
            data=str(tmp_path / "data" / "d"),
            axes=jobs.Axes(pipeline=nodes, expert=2),
            ask=jobs.Ask(nodes=nodes, time=limit),
        )

    return make


@pytest.fixture
def finish():
    """Wait for a run's end and return its state."""

    def wait(run: record.Run, seconds: float = 60):
        return wait_until(lambda: (state := states.of_run(run)) and not state.active and state, seconds, run)

    return wait


@pytest.fixture(autouse=True)
def no_job_outlives_its_test(site):
    yield
    site.host.call("scancel", f"--user={getpass.getuser()}")
