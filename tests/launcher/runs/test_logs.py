"""Logs: the right file by rank and attempt, followed over requeues, events read from their end."""

import json
import threading
import time

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.errors import UsageError
from launcher.runs import logs


def write(run_dir, attempt, source, text):
    path = logs.path(run_dir, attempt, source)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        stream.write(text)


def test_the_newest_attempts_first_rank_unless_told_otherwise(tmp_path):
    for attempt in (0, 2, 10):
        for source in (0, 3, "batch"):
            write(tmp_path, attempt, source, "x\n")
    assert logs.attempts(tmp_path) == [0, 2, 10]
    assert logs.find(tmp_path).parts[-2:] == ("attempt_10", "rank_0.log")
    assert logs.find(tmp_path, attempt=2, source=3).parts[-2:] == ("attempt_2", "rank_3.log")
    assert logs.find(tmp_path, source="batch").name == "batch.log"


def test_what_isnt_there_is_answered_with_what_is(tmp_path):
    with pytest.raises(UsageError, match="no logs yet"):
        logs.find(tmp_path)
    write(tmp_path, 0, 0, "x\n")
    write(tmp_path, 0, "batch", "x\n")
    with pytest.raises(UsageError, match="no attempt 3; there are: 0"):
        logs.find(tmp_path, attempt=3)
    with pytest.raises(UsageError, match="no log of 7; there are: 0, batch"):
        logs.find(tmp_path, source=7)


def test_following_goes_on_into_the_next_attempt_and_ends_with_the_job(tmp_path):
    """A writer that pauses, tears a line in two, begins a new attempt, and leaves its last line without an end."""
    going = threading.Event()
    going.set()

    def job():
        for attempt, text in ((0, "one\ntw"), (0, "o\n"), (1, "three\nfour")):
            time.sleep(0.1)
            write(tmp_path, attempt, 0, text)
        going.clear()

    writer = threading.Thread(target=job)
    writer.start()
    assert list(logs.follow(tmp_path, active=going.is_set)) == ["one", "two", "three", "four"]
    writer.join()


def test_following_an_ended_job_is_reading_it(tmp_path):
    write(tmp_path, 0, 1, "a\nb\n")
    write(tmp_path, 1, 1, "c\n")
    assert list(logs.follow(tmp_path, source=1, attempt=0, active=lambda: False)) == ["a", "b", "c"]
    assert list(logs.follow(tmp_path, source=1, active=lambda: False)) == ["c"]
    assert list(logs.follow(tmp_path, source=9, active=lambda: False)) == []


def test_a_torn_last_line_of_one_attempt_doesnt_join_the_next(tmp_path):
    write(tmp_path, 0, 0, "torn")
    write(tmp_path, 1, 0, "whole\n")
    assert list(logs.follow(tmp_path, attempt=0, active=lambda: False)) == ["torn", "whole"]


def test_the_newest_event_of_each_kind(tmp_path):
    lines = [json.dumps({"event": "start", "world": 2})]
    lines += [json.dumps({"event": "step", "step": n, "padding": "x" * 500}) for n in range(1000)]
    lines += ["[1, 2]", '{"no": "kind"}', '{"event": "st']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert logs.newest(tmp_path)["step"]["step"] == 999
    assert 0 < len(list(logs.events(tmp_path))) < 200  # the file's end, not all of it


def test_no_events_are_no_error(tmp_path):
    assert logs.newest(tmp_path) == {}


def test_all_ranks_are_followed_at_once_those_that_come_later_too(tmp_path):
    going = threading.Event()
    going.set()

    def job():
        for attempt, rank, text in ((0, 0, "a\n"), (0, 1, "b\n"), (1, 1, "c\n"), (1, 0, "d")):
            time.sleep(0.1)
            write(tmp_path, attempt, rank, text)
        going.clear()

    writer = threading.Thread(target=job)
    writer.start()
    assert sorted(logs.follow_all(tmp_path, active=going.is_set)) == [(0, "a"), (0, "d"), (1, "b"), (1, "c")]
    writer.join()


@pytest.fixture
def typed(tmp_path, monkeypatch):
    """`mixlaunch logs` about a run of three ranks and two attempts."""
    record = {"schema": 1, "job": "finetune", "created": "2026-01-01", "jobs": ["1"]}
    record |= {"nodes": 1, "tasks_per_node": 12}
    record |= {"profile": {"name": "selene", "scheduler": "slurm"}, "host": "login", "resumable": True}
    record |= {"cancelled": False}
    (tmp_path / "run.json").write_text(json.dumps(record))
    for attempt in (0, 1):
        for rank in (0, 1, 10):
            write(tmp_path, attempt, rank, f"rank {rank}\nattempt {attempt}\n")
        write(tmp_path, attempt, "batch", "mixlaunch: done; exit 0\n")

    def run(*argv):
        return CliRunner().invoke(cli, ["logs", str(tmp_path), *argv])

    return run


@pytest.mark.parametrize(
    ("argv", "printed"),
    [
        ((), "rank 0\nattempt 1\n"),
        (("--rank", "10", "--attempt", "0"), "rank 10\nattempt 0\n"),
        (("--batch",), "mixlaunch: done; exit 0\n"),
        (("--rank", "all", "--grep", "^rank .$"), "[ 0] rank 0\n[ 1] rank 1\n"),
        (("--grep", "ATTEMPT"), ""),
        (("--grep", "(?i)ATTEMPT"), "attempt 1\n"),
    ],
)
def test_what_is_asked_for_is_printed(typed, argv, printed):
    done = typed(*argv)
    assert (done.exit_code, done.output) == (0, printed)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--grep", "a(b"), "'a(b' isn't a regular expression: missing )"),
        (("--rank", "first"), "'first' is neither a rank's number nor `all`"),
        (("--rank", "-1"), "'-1' is neither"),
        (("--rank", "7"), "no log of 7; there are: 0, 1, 10, batch"),
        (("--rank", "all", "--attempt", "9"), "no attempt 9; there are: 0, 1"),
    ],
)
def test_a_mistake_ends_with_2_and_is_named(typed, argv, said):
    done = typed(*argv)
    assert (done.exit_code, said in done.output) == (2, True), done.output
