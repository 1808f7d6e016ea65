"""Follows a run: its events and log lines as they come, whether it is still active, and events in words.

It only reads; the command line decides what to print.
"""

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

from launcher.common import shared_files, words
from launcher.runs import logs, states
from launcher.runs.record import Run
from megatron_mixtral.spec import rundir

ASK_SLURM_EVERY = 3.0
ASK_HERE_EVERY = 0.5
ALL = "all"


def active(run: Run) -> Callable[[], bool]:
    """Whether the run is still active; the scheduler is asked only every few seconds."""
    asked, answer = 0.0, True
    grown = run.host.follow(run.path)
    every = ASK_HERE_EVERY if run.is_local else ASK_SLURM_EVERY

    def ask() -> bool:
        nonlocal asked, answer
        if grown:
            grown.check()
        if answer and time.monotonic() - asked > every:
            answer, asked = states.of_run(run).active, time.monotonic()
            if grown and not answer:
                grown.settle()
        return answer

    return ask


def log_lines(
    run: Run, *, source: int | str, attempt: int | None, follow: bool, pattern: re.Pattern[str] | None = None
) -> Iterator[str]:
    """A log's lines that match `pattern`; with `follow` also new ones. Lines of all ranks begin with the rank."""
    if source == ALL:
        width = len(str(run.record.get("nodes", 1) * run.record.get("tasks_per_node", 1) - 1))
        pairs = ((f"[{rank:>{width}}] ", line) for rank, line in _all_lines(run, attempt, follow))
    elif follow:
        pairs = (("", line) for line in logs.follow(run.path, source=source, attempt=attempt, active=active(run)))
    else:
        pairs = (("", line) for line in logs.lines(logs.find(run.path, attempt=attempt, source=source)))
    return (head + line for head, line in pairs if pattern is None or pattern.search(line))


def _all_lines(run: Run, attempt: int | None, follow: bool) -> Iterator[tuple[int | str, str]]:
    if follow:
        return logs.follow_all(run.path, attempt=attempt, active=active(run))
    logs.find(run.path, attempt=attempt, source=logs.BATCH)
    number = logs.attempts(run.path)[-1] if attempt is None else attempt
    everyone = logs.ranks(run.path, number)
    return ((rank, line) for rank in everyone for line in logs.lines(logs.path(run.path, number, rank)))


def events(run: Run) -> Iterator[dict[str, Any]]:
    """Events as they are written, until the run has ended; an empty event lets the caller do other work."""
    going_on, position, path = active(run), 0, run.path / rundir.EVENTS
    while True:
        going = going_on()
        with contextlib.suppress(OSError), shared_files.opened(path) as stream:
            stream.seek(position)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                if event := logs.event_of(line):
                    yield event
        if not going:
            return
        yield {}
        time.sleep(logs.POLL)


def describe(event: dict[str, Any]) -> str:
    """One event in a few words; empty for events that people don't need."""
    match event:
        case {
            "event": "step",
            "step": step,
            "steps": steps,
            "loss": float(loss),
            "tokens_per_s": int() | float() as speed,
        }:
            return f"step {step}/{steps}  loss {loss:.3f}  {words.count(speed)} tok/s"
        case {"event": "eval", "step": step, "loss": float(loss)}:
            return f"step {step}: validation loss {loss:.3f}"
        case {"event": "checkpoint", "step": step, "seconds": float(seconds)}:
            return f"step {step}: saved in {seconds:.1f} s"
        case {"event": "progress", "done": done, "total": total, "unit": unit}:
            suffix, left = "B" if unit == "bytes" else f" {unit}", event.get("left")
            rest = f", {left:.0f} s left" if left and done < total else ""
            return f"{words.count(done)}{suffix} of {words.count(total)}{suffix}{rest}"
        case {"event": "note", "text": str(text)}:
            return text
        case {"event": "unhealthy", "node": node, "reason": reason}:
            return f"{node} isn't fit: {reason}"
        case {"event": "ready", "url": url}:
            return f"ready at {url}"
        case {"event": "exit", "reason": str(reason), "code": int(code)} if code:
            return f"left: {reason}"
    return ""
