"""Processes are known by their mark: strangers are never touched, children and orphans are found."""

import os
import signal
import subprocess
import time

import pytest

from launcher.common import processes


@pytest.fixture
def mark(tmp_path):
    """A mark of this test's own; nothing that carries it outlives the test."""
    value = str(tmp_path)
    yield value
    processes.stop(lambda: processes.marked(MARK=value), grace=0, first=signal.SIGKILL)


def start(tmp_path, mark, does):
    environment = {"PATH": os.environ["PATH"], "MARK": mark}
    return processes.start(["bash", "-c", does], env=environment, cwd=tmp_path, log=tmp_path / "log")


def until(condition):
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_started_process_is_marked_detached_and_logged(tmp_path, mark):
    pid = start(tmp_path, mark, "echo out; echo err >&2; sleep 60")
    until(lambda: pid in processes.marked(MARK=mark))
    until(lambda: (tmp_path / "log").read_text() == "out\nerr\n")
    assert os.getsid(pid) == pid
    assert processes.is_marked(pid, MARK=mark)
    assert processes.is_marked(pid, MARK="")
    assert not processes.is_marked(pid, MARK=mark + "x")
    assert not processes.is_marked(pid, MARK=mark, OTHER="")


def test_children_that_left_for_another_session_are_found(tmp_path, mark):
    start(tmp_path, mark, "setsid sleep 60 & setsid sleep 60 & exit")
    until(lambda: len(processes.marked(MARK=mark)) == 2)
    assert processes.stop(lambda: processes.marked(MARK=mark), grace=5) == []


def test_what_ignores_the_first_signal_is_killed(tmp_path, mark):
    start(tmp_path, mark, "trap '' TERM; touch ready; while :; do sleep 0.1; done")
    until((tmp_path / "ready").exists)
    began = time.monotonic()
    assert processes.stop(lambda: processes.marked(MARK=mark), grace=0.3) == []
    assert time.monotonic() - began < 5


def test_a_pid_that_is_a_strangers_by_now_gets_no_signal(tmp_path, mark):
    """Between the look and the signal the process is another one: the second look says so."""
    stranger = subprocess.Popen(["sleep", "60"])
    looks = iter([[stranger.pid], []])
    processes.send(lambda: next(looks), signal.SIGKILL)
    time.sleep(0.1)
    assert stranger.poll() is None
    stranger.kill()
    stranger.wait()


def test_descendants_are_everyone_below(tmp_path, mark):
    top = start(tmp_path, mark, "bash -c 'sleep 60 & sleep 60 & wait' & wait")
    until(lambda: len(processes.marked(MARK=mark)) == 4)
    assert sorted([top, *processes.descendants([top])]) == sorted(processes.marked(MARK=mark))


def test_an_end_is_noticed(tmp_path, mark):
    pid = start(tmp_path, mark, "exit 3")
    until(lambda: processes.ended(pid))
    assert processes.wait(lambda: processes.marked(MARK=mark), 5) == []


def test_bash_that_is_just_reading_its_environment_is_known(monkeypatch):
    monkeypatch.setattr(processes, "_environment", lambda _: b"HOME=/root\0MARK\0x\0PATH=/bin\0")
    assert processes.is_marked(1, MARK="x", HOME="/root")
    assert processes.is_marked(1, MARK="", PATH="")
    assert not processes.is_marked(1, MARK="y")
    assert not processes.is_marked(1, ARK="x")
    assert not processes.is_marked(1, HOME="/roo")


def test_a_process_is_known_as_soon_as_it_is_started(tmp_path, mark):
    for _ in range(30):
        pid = start(tmp_path, mark, "while :; do sleep 60; done")  # a single command would be an exec of its own
        assert processes.is_marked(pid, MARK=mark)
