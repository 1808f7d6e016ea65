"""Every job's script on every built-in cluster, word for word. A change here is a change of what users' jobs do.

Record anew with `MIXLAUNCH_RECORD=1 python -m pytest tests/golden`, then read the difference before committing it.
"""

import difflib
import os
from pathlib import Path

import pytest

from launcher.cluster import profile
from launcher.planning import jobs
from launcher.script import lint, render

HERE = Path(__file__).parent
RECORD = "MIXLAUNCH_RECORD"
BUILT_IN = sorted(p.stem for p in (HERE.parent.parent / "clusters").glob("*.yaml"))
ASKED = {
    "tiny": ("tiny", {"output": "/home/me/tiny"}),
    "download": ("download", {}),
    "prepare": ("prepare", {"files": ("/home/me/text.jsonl",)}),
    "convert": ("convert", {"preset": "train"}),
    "convert-to-hf": ("convert", {"to": "hf", "model": "finetune-20260101-000000-abcd"}),
    "verify": ("verify", {"folder": "/home/me/converted"}),
    "finetune": ("finetune", {"values": {"steps": 1000, "lr": 1e-5}}),
    "serve": ("serve", {}),
    "serve-vllm": ("serve", {"values": {"engine": "vllm"}}),
}
GPUS = {"finetune": 32}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """Nothing of this machine shows in a recording."""
    for name in ("MIXLAUNCH_CLUSTER", "MIXLAUNCH_CLUSTERS", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MIXLAUNCH_PYTHON", "/opt/mixlaunch/bin/python")
    monkeypatch.setenv("MIXLAUNCH_STATE", "/home/me/state")
    monkeypatch.setenv("MIXLAUNCH_SANDBOX", "/home/me/sandbox")


def planned(case: str, cluster: profile.ClusterProfile) -> jobs.JobPlan:
    job, asked = ASKED[case]
    nodes = GPUS[case] // cluster.node.gpus if case in GPUS and not cluster.is_local else None
    return jobs.PLANS[job](cluster, ask=jobs.Ask(nodes=nodes), **asked)


@pytest.mark.parametrize("cluster", BUILT_IN)
@pytest.mark.parametrize("case", ASKED)
def test_script(case, cluster):
    plan = planned(case, profile.load(cluster))
    script = render.render(plan)
    lint.check(script)
    golden = HERE / cluster / f"{case}.sh"
    if os.environ.get(RECORD):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(script)
    recorded = golden.read_text() if golden.exists() else ""
    if script != recorded:
        difference = difflib.unified_diff(
            recorded.splitlines(), script.splitlines(), "recorded", "rendered now", lineterm="", n=2
        )
        shown = "\n".join(difference)
        pytest.fail(
            f"{golden.relative_to(HERE.parent.parent)} differs:\n{shown}\n\nIf that is meant, record it anew: "
            f"{RECORD}=1 python -m pytest tests/golden",
            pytrace=False,
        )


def test_every_job_is_recorded():
    assert {job for job, _ in ASKED.values()} == set(jobs.PLANS)


def test_nothing_recorded_is_left_over():
    recorded = {p.relative_to(HERE).as_posix() for p in HERE.glob("*/*.sh")}
    assert recorded == {f"{cluster}/{case}.sh" for cluster in BUILT_IN for case in ASKED}


@pytest.mark.parametrize("cluster", BUILT_IN)
@pytest.mark.parametrize("case", ASKED)
def test_the_submitted_form_differs_only_in_the_run_directory(case, cluster):
    plan = planned(case, profile.load(cluster))
    exported, submitted = render.render(plan), render.render(plan, f"{plan.profile.paths.runs}/RUN")
    lint.check(submitted)
    changed = [
        line[1:]
        for line in difflib.unified_diff(exported.splitlines(), submitted.splitlines(), lineterm="", n=0)
        if line[0] in "+-" and not line.startswith(("+++", "---"))
    ]
    assert changed
    assert all(line.startswith(("export MIXLAUNCH_RUN=", "#SBATCH --output=")) for line in changed)
