"""A home of its own for every test of the launcher: no profile, state or setting of the machine leaks in."""

from pathlib import Path

import pytest

PROFILE = """
scheduler: slurm
account: llm
partition: gpu
node: {gpus: 8, cpus: 64, memory_gb: 512, gpu_memory_gb: 80}
python: /opt/venv/bin/python
paths: {models: /shared/models, data: /shared/data, runs: /shared/runs}
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("MIXLAUNCH_CLUSTER", "MIXLAUNCH_CLUSTERS", "MIXLAUNCH_SANDBOX", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


@pytest.fixture
def write_profile(tmp_path):
    """Write a profile and return its path; `more` is added, and replaces whole top-level keys."""

    def write(more: str = "", text: str = PROFILE) -> Path:
        keys = {line.split(":")[0] for line in more.splitlines() if line and not line.startswith(" ")}
        kept = [line for line in text.splitlines() if line.split(":")[0] not in keys]
        path = tmp_path / "cluster.yaml"
        path.write_text("\n".join([*kept, more, ""]))
        return path

    return write


@pytest.fixture
def cluster(write_profile):
    """A cluster of eight-GPU nodes, read from a file as users' are."""
    from launcher.cluster import profile

    return profile.read(write_profile())
