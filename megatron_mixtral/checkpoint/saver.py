"""A run's saves: in the foreground, or on a thread while training continues. Events report their duration.

At most one save runs at a time. A save that fails on one rank fails on all ranks at the end of the same step.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mixtral.checkpoint import save_load
from megatron_mixtral.errors import SaveError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.weights.folder import prune, step_folder


@dataclass(frozen=True, kw_only=True)
class UnderWay:
    """A save that a thread is writing."""

    step: int
    folder: Path
    begun: float
    pause: float  # seconds that training stood still for it
    written: Future[int]


class Saver:
    """Saves into `root` and keeps the newest `keep` there."""

    def __init__(
        self, root: Path, *, keep: int, asynchronous: bool, events: EventLog, say: Callable[[str], None]
    ) -> None:
        self._root, self._keep, self._events, self._say = root, keep, events, say
        # The saving threads communicate while the ranks communicate about training, so they have a group of their
        # own.
        self._group = dist.new_group(backend="gloo") if asynchronous else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="save") if asynchronous else None
        self._under_way: UnderWay | None = None

    def save(self, step: int, *parts: Any, wait: bool, **more: Any) -> None:
        """Save `step`; the other arguments are those of `begin`. With `wait` the save is complete on return."""
        begun = time.monotonic()
        self.finish()
        self._events.write("saving", step=step)
        folder = step_folder(self._root, step)
        copied = self._thread is not None and not wait
        unwritten = save_load.begin(folder, *parts, step=step, group=self._group, copied=copied, **more)
        if self._thread is None or wait:
            self._tell(step, folder, begun, unwritten.write(), None)
            return
        written = self._thread.submit(unwritten.write)
        pause = time.monotonic() - begun
        self._say(f"step {step} | saving {folder}; training stood still for {pause:.2f} s")
        self._under_way = UnderWay(step=step, folder=folder, begun=begun, pause=pause, written=written)

    def failed(self) -> bool:
        """Whether the running save has failed on this rank; a finished save is reported."""
        if not (one := self._under_way) or not one.written.done():
            return False
        if one.written.exception():
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Wait for the running save; its error, which is the same on all ranks, is raised here."""
        if one := self._under_way:
            self._under_way = None
            self._tell(one.step, one.folder, one.begun, one.written.result(), one.pause)

    def close(self) -> None:
        """Like `finish`, but an error is only printed."""
        try:
            self.finish()
        except SaveError as error:
            self._say(f"error: {error}")

    def _tell(self, step: int, folder: Path, begun: float, size: int, pause: float | None) -> None:
        seconds = time.monotonic() - begun
        self._events.write(
            "checkpoint",
            step=step,
            path=str(folder),
            seconds=round(seconds, 2),
            pause=round(seconds if pause is None else pause, 2),
            bytes=size,
        )
        self._say(f"step {step} | saved {folder} in {seconds:.2f} s")
        if dist.get_rank() == 0:
            prune(self._root, self._keep)
