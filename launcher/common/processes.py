"""Our own processes, found by one variable in the environment that they were started with.

A pid may belong to another program by now. A process whose first environment holds our variable with our value is
ours. So processes to end are found by this mark, which children inherit, and are signalled through a pidfd.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

Find = Callable[[], list[int]]

# Popen objects of processes that outlive us. They are kept, so Python reaps them and prints no warning.
_started: list["subprocess.Popen[bytes]"] = []
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # daemons live here, and an ordinary PATH lacks them


def which(program: str) -> str | None:
    """Where `program` lies, daemons' folders included."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


def start(argv: Sequence[str], *, env: Mapping[str, str], cwd: Path, log: Path) -> int:
    """Start `argv` in a session of its own, off the terminal, its output appended to `log`; returns the pid."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=dict(env),
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _started.append(process)
    # During its exec a process has no environment yet, so nothing shows that it is ours.
    while process.poll() is None and not _environment(process.pid):
        time.sleep(0.001)
    return process.pid


def is_marked(pid: int, **variables: str) -> bool:
    """Whether `pid` runs and was started with all of `variables` in its environment; an empty value is any.

    While bash starts it has, for a moment, a zero in place of the equals sign that it is looking at.
    """
    environment = b"\0" + _environment(pid)
    return all(
        any(f"\0{name}{sign}{value}".encode() + b"\0" * bool(value) in environment for sign in "=\0")
        for name, value in variables.items()
    )


def marked(**variables: str) -> list[int]:
    """Every process of this user that `is_marked` with `variables`, except ourselves."""
    return [pid for pid in _pids() if pid != os.getpid() and is_marked(pid, **variables)]


def descendants(roots: Iterable[int]) -> list[int]:
    """Children, grandchildren and so on of `roots`, the roots left out."""
    children: dict[int, list[int]] = {}
    for pid in _pids():
        with suppress(OSError, ValueError, IndexError):
            # The second field is the program's name in brackets and may hold anything, brackets too.
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(pid)
    found: list[int] = []
    queue = list(roots)
    while queue:
        below = children.get(queue.pop(), [])
        found += below
        queue += below
    return found


def stop(find: Find, *, grace: float, first: signal.Signals = signal.SIGTERM) -> list[int]:
    """Send `first` to all that `find` returns, SIGKILL after `grace` seconds; returns what is still alive after
    that.
    """
    send(find, first)
    if wait(find, grace):
        send(find, signal.SIGKILL)
    return wait(find, 5.0)


def send(find: Find, signum: signal.Signals) -> None:
    """Send `signum` to all that `find` returns, and to no process that has reused one of their pids."""
    handles: dict[int, int] = {}
    for pid in find():
        with suppress(OSError):
            handles[pid] = os.pidfd_open(pid)
    still_ours = set(find())  # looked up again now that the handles pin the processes down
    for pid, handle in handles.items():
        if pid in still_ours:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signum)
        os.close(handle)


def wait(find: Find, seconds: float) -> list[int]:
    """Wait until `find` returns nothing twice in a row, at most so long; returns what it still does.

    Twice, because a process in the middle of its exec has no environment to be known by.
    """
    deadline = time.monotonic() + seconds
    empty = 0
    while True:
        _reap()
        left = find()
        empty = 0 if left else empty + 1
        if empty == 2 or time.monotonic() > deadline:
            return left
        time.sleep(0.03)


def ended(pid: int) -> bool:
    """Whether a process that `start` started here has ended."""
    return all(process.pid != pid or process.poll() is not None for process in _started)


def _environment(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def _reap() -> None:
    _started[:] = [process for process in _started if process.poll() is None]


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())
