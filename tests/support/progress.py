"""A pytest plugin: while several workers run, a line every few seconds says how far they are and what runs.

It stands in for pytest's dots, of which the first came after minutes. A failure is told at once.
"""

import threading
import time

import pytest

EVERY = 15.0  # seconds


def pytest_configure(config):
    if config.getoption("numprocesses", None) and config.get_verbosity() == 0:
        config.pluginmanager.register(Progress(config))


class Progress:
    """Counts what the workers tell; `line` is what a person reads."""

    def __init__(self, config):
        self.config = config
        self.began = time.monotonic()
        self.since: dict[str, float] = {}  # when each test that runs began
        self.done = self.failed = 0
        self.over = threading.Event()

    def pytest_sessionstart(self, session):
        self.session = session
        threading.Thread(target=self._tell, daemon=True).start()

    def pytest_sessionfinish(self):
        self.over.set()

    def pytest_runtest_logstart(self, nodeid):
        self.since[nodeid] = time.monotonic()

    def pytest_runtest_logfinish(self, nodeid):
        self.since.pop(nodeid, None)
        self.done += 1

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed += 1
            self._write(f"FAILED {report.nodeid} ({report.when})", red=True)

    @pytest.hookimpl(wrapper=True)
    def pytest_report_teststatus(self):
        category, *_ = yield
        return category, "", ""

    def line(self, now: float) -> str:
        """`3:05  23 %  531 of 2287 tests, 1 failed; now: FILE::TEST (12 s), ...`, the longest at work first."""
        minutes, seconds = divmod(int(now - self.began), 60)
        total = self.session.testscollected
        if not total:
            return f"{minutes}:{seconds:02}  collecting tests"
        failed = f", {self.failed} failed" if self.failed else ""
        names = [f"{short(name)} ({now - since:.0f} s)" for name, since in [*self.since.items()]]
        share = f"{minutes}:{seconds:02}  {100 * self.done // total} %  {self.done} of {total} tests{failed}"
        return f"{share}; now: {', '.join(names)}"

    def _tell(self):
        while not self.over.wait(EVERY):
            self._write(self.line(time.monotonic()))

    def _write(self, text, **markup):
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        terminal.ensure_newline()
        terminal.write_line(text, **markup)
        terminal.flush()


def short(nodeid: str) -> str:
    """A test's file and name, without its folder and parameters."""
    return nodeid.rpartition("/")[2].partition("[")[0]
