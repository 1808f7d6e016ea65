"""A pytest plugin: whatever ends a test run, all that the run started ends with it.

Each pytest process, a worker of pytest-xdist as well, marks the environment of what it starts. It also starts a
watcher, which is this file as a program. When pytest is gone before it came to the end of its tests, by Ctrl-C or
killed, the watcher ends what carries the mark and what descends from that. After a whole run it ends nothing: what
tests leave behind is a mistake that `.ci/run` looks for.
"""

import os
import secrets
import select
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from launcher.common import processes

PREFIX = "STARTED_BY_PYTEST_"  # one variable a pytest process, since a test may start a pytest of its own
GRACE = 3.0  # seconds between SIGTERM and SIGKILL
UNFINISHED = (2, 3)  # pytest's exit codes for "interrupted" and "internal error"


def pytest_configure(config):
    name = PREFIX + secrets.token_hex(8)
    alive = os.pidfd_open(os.getpid())
    config.watcher = subprocess.Popen(
        [sys.executable, __file__, name, str(alive)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C isn't for it
        pass_fds=[alive],
    )
    os.close(alive)
    os.environ[name] = "1"


def pytest_unconfigure(config):
    """Called at each end that pytest comes to by itself, with the fixtures torn down; never when it is killed."""
    if config.watcher.stdin and getattr(config, "finished", False):
        config.watcher.communicate(b"finished")


def pytest_sessionfinish(session, exitstatus):
    session.config.finished = exitstatus not in UNFINISHED


def marks() -> dict[str, str]:
    """For a process that is started with an environment of its own."""
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX)}


class Started:
    """Finds what carries the mark and what descends from it, also when the parent between them has ended since."""

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.born: dict[int, str] = {}

    def __call__(self) -> list[int]:
        marked = processes.marked(**{self.mark: "1"})
        for pid in {*marked, *processes.descendants(marked)} - {os.getpid()}:
            self.born[pid] = birth(pid)
        return [pid for pid, born in self.born.items() if born and birth(pid) == born]


def birth(pid: int) -> str:
    """When the process started, in the kernel's ticks; empty if it has ended."""
    with suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[18] if state not in "ZX" else ""
    return ""


def finished(pytest: int) -> bool:
    """Wait for pytest to say that it came to its end, or to be gone."""
    ready, _, _ = select.select([pytest, sys.stdin], [], [])
    if sys.stdin in ready and os.read(sys.stdin.fileno(), 1):
        return True
    select.select([pytest], [], [])
    return False


if __name__ == "__main__":
    if not finished(int(sys.argv[2])):
        processes.stop(Started(sys.argv[1]), grace=GRACE)
