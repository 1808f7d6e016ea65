"""Progress of a long copy: a bar on a terminal, a line now and then in a log, and events for `status`."""

import sys
import time
from collections.abc import Callable
from typing import Any

from megatron_mixtral.observability.events import EventLog

LINE_EVERY = 10.0
EVENT_EVERY = 2.0


class CopyProgress:
    """Counts the bytes of this process up to `total`; called from one thread.

    Events tell of all processes: `whole` is the bytes of all, `elsewhere` how many of them others have done.
    """

    def __init__(
        self,
        total: int,
        *,
        label: str,
        events: EventLog,
        whole: int | None = None,
        elsewhere: Callable[[], int] = lambda: 0,
    ) -> None:
        self.total, self.label, self.events, self.done = total, label, events, 0
        self.whole, self.elsewhere, self._first = total if whole is None else whole, elsewhere, elsewhere()
        self.skipped = 0  # done by an earlier run, so it doesn't count for the speed
        self._begun = self._line = self._event = time.monotonic()
        self._bar = _bar(total) if sys.stderr.isatty() else None

    def add(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self.done)
        elif now - self._line > LINE_EVERY:
            self._print(now)
        if now - self._event > EVENT_EVERY:
            self._tell(now)

    def skip(self, count: int) -> None:
        self.skipped += count
        self.add(count)

    def wait(self) -> None:
        """This process has finished its part; report the progress of the others."""
        if time.monotonic() - self._event > EVENT_EVERY:
            self._tell(time.monotonic())

    def finish(self) -> None:
        """Say that all is done."""
        if self._bar:
            self._bar.stop()
        self._print(time.monotonic())
        self._tell(time.monotonic())

    def _print(self, now: float) -> None:
        self._line = now
        speed = (self.done - self.skipped) / max(now - self._begun, 1e-3)
        left = f", {(self.total - self.done) / speed:.0f} s left" if speed and self.done < self.total else ""
        unit, name = (1e9, "GB") if self.total >= 1e9 else (1e6, "MB")
        size = f"{self.done / unit:.2f} of {self.total / unit:.2f} {name}"
        print(f"{self.label}: {size}, {speed / unit:.2f} {name}/s{left}", file=sys.stderr, flush=True)

    def _tell(self, now: float) -> None:
        self._event = now
        elsewhere = self.elsewhere()
        done, fresh = self.done + elsewhere, self.done - self.skipped + elsewhere - self._first
        left = (self.whole - done) * (now - self._begun) / fresh if fresh > 0 else None
        self.events.write("progress", done=done, total=self.whole, unit="bytes", left=left)


def _bar(total: int) -> Any:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    bar = progress.Progress(*columns, console=Console(stderr=True))
    bar.add_task("", total=total)
    bar.start()
    return bar
