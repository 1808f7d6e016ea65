"""What `status` reports: reasons in words, Slurm's clock in seconds, a server's load, and what is news."""

import json
from pathlib import Path

import pytest

from launcher.cli import status
from launcher.runs import report, servers
from launcher.runs.record import Run
from launcher.runs.states import State
from launcher.slurm import reasons

DOCS = Path(__file__).parents[3] / "docs" / "runs.md"


@pytest.fixture
def run(tmp_path):
    """A run directory with what its job has written so far."""

    def make(*events: dict, job: str = "finetune") -> Run:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        (tmp_path / "logs" / "attempt_1").mkdir(parents=True, exist_ok=True)
        record = {
            "job": job,
            "profile": {"name": "c", "scheduler": "slurm"},
            "created": "2026-01-01T10:00:00+00:00",
            "jobs": ["7", "9"],
        }
        return Run(path=tmp_path, record=record)

    return make


STEP = {"event": "step", "step": 40, "steps": 100, "loss": 2.5, "tokens_per_s": 12_345.0, "time": 5}
PENDING = State(state="PENDING", source="slurm", reason="Resources", start="2026-01-02T03:04:05")
RUNNING = State(state="RUNNING", source="slurm", nodes="gpu[01-02]", time_left="1-02:03:04")


def test_a_running_job(run):
    facts = report.of(run(STEP), RUNNING)
    assert (facts["step"], facts["steps"], facts["loss"], facts["tokens_per_s"]) == (40, 100, 2.5, 12_345.0)
    assert (facts["nodes"], facts["time_left_s"]) == (["gpu01", "gpu02"], 93_784)
    assert (facts["attempt"], facts["job_id"], facts["job_ids"]) == (1, "9", ["7", "9"])
    shown = dict(zip(status.COLUMNS, status.row(facts), strict=True))
    assert (shown["PROGRESS"], shown["LOSS"], shown["TOK/S"], shown["LEFT"]) == ("40/100", "2.500", "12.3k", "1d")


def test_a_waiting_job_says_why_and_until_when(run):
    facts = report.of(run(), PENDING)
    assert (facts["reason"], facts["starts"], facts["started"]) == ("Resources", "2026-01-02T03:04:05", None)
    assert status.note(facts) == ("next in line, waits for nodes to become free; starts about Fri 02 Jan 03:04")


def test_a_loss_that_is_no_number_is_shown_as_it_is(run):
    facts = report.of(run(STEP | {"loss": "nan"}), RUNNING)
    assert facts["loss"] == "nan"
    assert "nan" in status.row(facts)


def test_the_documented_keys_are_those_that_are_printed(run):
    documented = set()
    for line in DOCS.read_text().partition("## `status --json`")[2].partition("\n## ")[0].splitlines():
        if line.startswith("| `"):
            documented |= {name.strip(" `") for name in line.split("|")[1].split(",")}
    assert documented == set(report.of(run(STEP), RUNNING))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9:59", 599), ("1:00:00", 3600), ("2-00:00:01", 172_801), ("UNLIMITED", None), ("NOT_SET", None), ("", None)],
)
def test_slurms_clock(text, seconds):
    assert report.seconds(text) == seconds


def test_time_that_passes_is_no_news(run):
    before = report.of(run(STEP), RUNNING)
    assert not report.changed(before, before | {"time_left_s": 5})
    assert report.changed(before, before | {"step": 41})
    assert report.changed(None, before)


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Priority", "jobs of higher priority go first"),
        ("ReqNodeNotAvail, UnavailableNodes:gpu07", "nodes that it needs are down, drained or reserved"),
        ("QOSMaxGRESPerUser", "the limit of jobs or resources per user is reached"),
        ("AssocGrpGRES", "the account's or the QoS's share is used up by running jobs"),
        ("QOSGrpNodeLimit", "the account's or the QoS's share is used up by running jobs"),
        ("QOSMaxWallDurationPerJobLimit", "asks for more than one job may have under its account or QoS"),
        ("PartitionTimeLimit", "asks for more time than the partition allows, so it can never start"),
        ("DependencyNeverSatisfied", "the job that it depends on failed, so it can never start"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_reasons_in_words(reason, words):
    assert reasons.find(reason).words == words


METRICS = """# HELP mixlaunch_requests_running Requests that the engine works on
# TYPE mixlaunch_requests_running gauge
mixlaunch_requests_running 3.0
mixlaunch_requests_queued 2.0
mixlaunch_http_requests_total{route="/v1/completions",status="200"} 40.0
mixlaunch_http_requests_total{route="/api",status="400"} 2.0
mixlaunch_http_requests_total{route="/metrics",status="200"} 900.0
mixlaunch_http_requests_total{route="/health",status="200"} 500.0
mixlaunch_http_requests_created{route="/api",status="400"} 1.7e+09
"""


def test_a_servers_load_is_its_work_and_not_the_questions_about_it():
    before = servers.load(METRICS, at=100.0)
    assert (before.running, before.queued, before.requests) == (3, 2, 42)
    now = servers.load(METRICS.replace("40.0", "50.0"), at=104.0)
    assert now.rate(before) == 2.5
    assert before.rate(None) is None
    assert before.rate(now) is None  # a server that began anew
