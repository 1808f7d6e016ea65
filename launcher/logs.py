"""What a run wrote: one file a rank and attempt, the batch script's own, and the events of training.

Reading never waits for the whole file: tails are cut from the end, `follow` goes on into the next attempt.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from launcher.errors import UsageError

EVENTS = "events.jsonl"
TAIL = 65_536  # bytes of events.jsonl that hold the newest of each kind
BATCH = "batch"
POLL = 0.3


def attempts(run_dir: Path) -> list[int]:
    """Numbers of the attempts that left logs, in order."""
    names = (path.name.removeprefix("attempt_") for path in (run_dir / "logs").glob("attempt_*"))
    return sorted(int(name) for name in names if name.isdigit())


def path(run_dir: Path, attempt: int, source: int | str = 0) -> Path:
    """The log of a rank, or of the batch script ("batch")."""
    return run_dir / "logs" / f"attempt_{attempt}" / (f"{BATCH}.log" if source == BATCH else f"rank_{source}.log")


def find(run_dir: Path, *, attempt: int | None = None, source: int | str = 0) -> Path:
    """The newest attempt's log unless told otherwise; `UsageError` names the attempts and ranks there are."""
    there = attempts(run_dir)
    if not there:
        raise UsageError(f"{run_dir.name} has no logs yet")
    chosen = there[-1] if attempt is None else attempt
    if chosen not in there:
        raise UsageError(f"{run_dir.name} has no attempt {chosen}; there are: {', '.join(map(str, there))}")
    log = path(run_dir, chosen, source)
    if not log.exists():
        logs = sorted(p.stem.removeprefix("rank_") for p in log.parent.glob("*.log"))
        raise UsageError(f"{run_dir.name}, attempt {chosen}: no log of {source}; there are: {', '.join(logs)}")
    return log


def follow(
    run_dir: Path, *, source: int | str = 0, attempt: int | None = None, active: Callable[[], bool]
) -> Iterator[str]:
    """Lines as they come, a later attempt's after an earlier's, until the log is read and `active()` says no.

    Starts with the given attempt, by default the newest. `active` is asked only when nothing new came.
    """
    there = attempts(run_dir)
    number = attempt if attempt is not None else (there[-1] if there else 0)
    position, rest = 0, b""
    while True:
        log = path(run_dir, number, source)
        chunk, position = _read_from(log, position)
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in lines)
        if chunk:
            continue
        if later := [n for n in attempts(run_dir) if n > number and path(run_dir, n, source).exists()]:
            if rest:
                yield rest.decode(errors="replace")
            number, position, rest = later[0], 0, b""
        elif active():
            time.sleep(POLL)
        elif not _read_from(log, position)[0]:  # what was written between our read and its end
            break
    if rest:
        yield rest.decode(errors="replace")


def events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The newest events, oldest first; lines that a crash cut in half are passed over."""
    try:
        with (run_dir / EVENTS).open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            lines = stream.read().split(b"\n")
    except OSError:
        return
    for line in lines if size <= TAIL else lines[1:]:
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and "event" in event:
            yield event


def newest(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The newest event of each kind: step, eval, checkpoint, ready, progress, exit."""
    return {str(event["event"]): event for event in events(run_dir)}


def _read_from(log: Path, position: int) -> tuple[bytes, int]:
    try:
        with log.open("rb") as stream:
            stream.seek(position)
            chunk = stream.read(1 << 20)
    except OSError:
        return b"", position
    return chunk, position + len(chunk)
