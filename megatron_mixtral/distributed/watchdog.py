"""The watchdog: a phase that takes longer than its limit ends the job with the stacks of all ranks.

Ranks write their position to small files in the log folder. So the rank that the others wait for is named, even if
it is stopped and can't report.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

GRACE = 5.0  # seconds for the other ranks to write their positions
LOOK = 0.5  # seconds between looks at the clock
EXIT = 1  # a fault; the job is retried while it makes progress
# Stack frames in which a rank waits for others: a part of the file name, or of the function name.
WAITING = ("torch/distributed", "torch\\distributed", "process_group", "p2p_communication")


class Watchdog:
    """One rank's. `enter` names the phase that begins and its limit."""

    def __init__(self, folder: Path, *, rank: int, world: int) -> None:
        self._folder, self._rank, self._world = folder, rank, world
        self._main = threading.main_thread().ident
        self._phase, self._limit, self._deadline = "start", 0.0, float("inf")
        self._over = threading.Event()
        self._mine.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @property
    def _mine(self) -> Path:
        return self._folder / f"hang_{self._rank}.json"

    def enter(self, phase: str, limit: float) -> None:
        """From now on `phase`, for at most `limit` seconds."""
        self._phase, self._limit = phase, limit
        self._deadline = time.monotonic() + limit
        # A fallback in C, for code that never lets another thread run.
        faulthandler.dump_traceback_later(limit + 4 * GRACE, exit=True)

    def close(self) -> None:
        """Stop watching."""
        self._over.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._over.wait(LOOK):
            now = time.monotonic()
            if (stood_still := now - last) > 10 * LOOK:
                self._deadline += stood_still  # the whole process was suspended, which isn't a hang
            last = now
            if now > self._deadline:
                self._end()

    def _end(self) -> None:
        print(
            f"error: {self._phase} takes longer than {self._limit:g} s; stacks follow", file=sys.stderr, flush=True
        )
        faulthandler.dump_traceback(all_threads=True)
        self._folder.mkdir(parents=True, exist_ok=True)
        rough = self._mine.with_suffix(".rough")
        rough.write_text(json.dumps({"phase": self._phase, **whereabouts(at_work(self._main))}))
        rough.replace(self._mine)
        if self._over.wait(GRACE):
            return
        print(f"error: {summary(self._folder, self._world)}", file=sys.stderr, flush=True)
        os._exit(EXIT)


def at_work(main: int | None) -> FrameType | None:
    """The stack of thread `main`, or of the saving thread if `main` waits for it."""
    frames = sys._current_frames()
    found = inner = frames.get(main or 0)
    while inner and "megatron_mixtral" not in inner.f_code.co_filename:
        if inner.f_code.co_filename.endswith("concurrent/futures/_base.py"):
            saving = next((t.ident for t in threading.enumerate() if t.name.startswith("save_")), None)
            return frames.get(saving or 0, found)
        inner = inner.f_back
    return found


def whereabouts(frame: FrameType | None) -> dict[str, Any]:
    """Whether the stack ends in waiting for other ranks, and the innermost place outside libraries."""
    waits, place, innermost = False, "", ""
    while frame:
        name = frame.f_code.co_filename
        here = f"{name.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"
        innermost = innermost or here
        waits = waits or (not place and any(part in name for part in WAITING))
        if not place and "site-packages" not in name and "/lib/python" not in name:
            place = here
        frame = frame.f_back
    return {"waits": waits, "at": place or innermost}


def summary(folder: Path, world: int) -> str:
    """The slow ranks: those that don't wait for others, and those that wrote nothing."""
    told: dict[int, dict[str, Any]] = {}
    for rank in range(world):
        try:
            told[rank] = json.loads((folder / f"hang_{rank}.json").read_text())
        except (OSError, ValueError):
            continue
    silent = [rank for rank in range(world) if rank not in told]
    busy = {rank: said for rank, said in told.items() if not said["waits"]}
    slow = [f"rank {rank} in {said['phase']} at {said['at']}" for rank, said in busy.items()]
    slow += [f"rank {rank}, which reports nothing" for rank in silent]
    waiting = len(told) - len(busy)
    where = sorted({said["phase"] for said in told.values()})
    return (
        f"no progress in {', '.join(where)}: slow: {'; '.join(slow[:8]) or 'no rank found'}; "
        f"{waiting} of {world} ranks wait for others"
    )
