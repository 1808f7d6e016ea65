"""Its presence puts this folder on the path: what several kinds of tests share lies here.

`make test` runs files of tests side by side; a test that is marked `alone` has the machine to itself all the same.
"""

import contextlib
import fcntl

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """First of all hooks, so that no test's time limit runs while it waits for the others."""
    if not hasattr(item.config, "workerinput"):  # no pytest-xdist: there are no others
        return (yield)
    with machine(item.config.cache.mkdir("machine"), alone=item.get_closest_marker("alone") is not None):
        return (yield)


@contextlib.contextmanager
def machine(folder, *, alone: bool):
    """The machine, for one or for all who don't want it for themselves; one that waits for it is next."""
    with open(folder / "turn", "w") as turn, open(folder / "work", "w") as work:
        fcntl.flock(turn, fcntl.LOCK_EX)
        fcntl.flock(work, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(turn, fcntl.LOCK_UN)
        try:
            yield
        finally:
            fcntl.flock(work, fcntl.LOCK_UN)  # by name: a child that a test forked may hold it open
