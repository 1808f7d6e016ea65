"""For all tests: nothing that they start outlives them, one sees what runs, and some don't share the machine.

`make test` runs files of tests side by side; a test that is marked `alone` has the machine to itself all the same,
and of those that are marked `many_ranks` one runs at a time.
"""

import contextlib
import fcntl

import pytest

pytest_plugins = ["end_with_pytest", "progress"]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """First of all hooks, so that no test's time limit runs while it waits for the others."""
    if not hasattr(item.config, "workerinput"):  # no pytest-xdist: there are no others
        return (yield)
    folder = item.config.cache.mkdir("machine")
    alone, many = (item.get_closest_marker(name) is not None for name in ("alone", "many_ranks"))
    with locked(folder / "many_ranks") if many else contextlib.nullcontext(), machine(folder, alone=alone):
        return (yield)


@contextlib.contextmanager
def machine(folder, *, alone: bool):
    """The machine, for one or for all who don't want it for themselves; one that waits for it is next."""
    with contextlib.ExitStack() as held:
        with locked(folder / "turn"):
            held.enter_context(locked(folder / "work", fcntl.LOCK_EX if alone else fcntl.LOCK_SH))
        yield


@contextlib.contextmanager
def locked(path, how=fcntl.LOCK_EX):
    with open(path, "w") as file:
        fcntl.flock(file, how)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # by name: a child that a test forked may hold it open
