"""Reads a run's logs: one file for each rank and attempt, the batch script's log, and the events.

Large files aren't read whole: a tail is read from the end. `follow` continues with the next attempt.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import UsageError
from megatron_mixtral.spec import rundir

TAIL = 65_536  # bytes at the end of events.jsonl that hold the newest event of each kind
BATCH = "batch"
POLL = 0.3
TERMINATED = 143


@dataclass(frozen=True, kw_only=True)
class Leaver:
    """The first rank that left with a code."""

    code: int
    rank: int
    node: str


def attempts(run_dir: Path) -> list[int]:
    """Numbers of the attempts that have logs, in order."""
    names = (path.name.removeprefix(rundir.ATTEMPT) for path in (run_dir / rundir.LOGS).glob(f"{rundir.ATTEMPT}*"))
    return sorted(int(name) for name in names if name.isdigit())


def path(run_dir: Path, attempt: int, source: int | str = 0) -> Path:
    """The log of a rank, or of the batch script ("batch")."""
    return (
        run_dir
        / rundir.LOGS
        / f"{rundir.ATTEMPT}{attempt}"
        / (f"{BATCH}.log" if source == BATCH else f"rank_{source}.log")
    )


def find(run_dir: Path, *, attempt: int | None = None, source: int | str = 0) -> Path:
    """The log of an attempt, by default the newest; `UsageError` names the existing attempts and ranks."""
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


def lines(log: Path) -> Iterator[str]:
    """A log line by line, however long it is; without line ends; bytes that aren't UTF-8 are marked."""
    with log.open("rb") as stream:
        for line in stream:
            yield line.rstrip(b"\r\n").decode(errors="replace")


def ranks(run_dir: Path, attempt: int) -> list[int]:
    """Ranks that left a log in that attempt, in order."""
    names = (path.stem.removeprefix("rank_") for path in path(run_dir, attempt, BATCH).parent.glob("rank_*.log"))
    return sorted(int(name) for name in names if name.isdigit())


def first_to_leave(run_dir: Path, attempt: int) -> Leaver | None:
    """The rank that left an attempt first; None if all are running, or none has started."""
    try:
        code, rank, node = (path(run_dir, attempt).parent / rundir.FIRST_EXIT).read_text().split()
        # bash reports -1 for a child that ended during a signal handler: the TERM that was passed on ended it.
        return Leaver(code=TERMINATED if int(code) < 0 else int(code), rank=int(rank), node=node)
    except (OSError, ValueError):
        return None


def follow(
    run_dir: Path, *, source: int | str = 0, attempt: int | None = None, active: Callable[[], bool]
) -> Iterator[str]:
    """Lines as they come, a later attempt's after an earlier's, until the log is read and `active()` says no.

    Starts with the given attempt, by default the newest. `active` is asked only when nothing new came.
    """
    for _, line in _follow(run_dir, lambda: [source], attempt, active):
        yield line


def follow_all(
    run_dir: Path, *, attempt: int | None = None, active: Callable[[], bool]
) -> Iterator[tuple[int | str, str]]:
    """(rank, line) of every rank as they come, ranks that start later too."""

    def known() -> list[int | str]:
        return sorted({rank for number in attempts(run_dir) for rank in ranks(run_dir, number)})

    return _follow(run_dir, known, attempt, active)


def _follow(
    run_dir: Path, sources: Callable[[], list[int | str]], attempt: int | None, active: Callable[[], bool]
) -> Iterator[tuple[int | str, str]]:
    there = attempts(run_dir)
    first = attempt if attempt is not None else (there[-1] if there else 0)
    readers: dict[int | str, _Reader] = {}
    ending = False
    while True:
        for source in sources():
            readers.setdefault(source, _Reader(run_dir, source, first))
        came = False
        for source, reader in readers.items():
            for line in reader.new():
                came = True
                yield source, line
        if came:
            continue
        if ending:  # this read also gets what was written between our last read and the end
            break
        ending = not active()
        if not ending:
            time.sleep(POLL)
    for source, reader in readers.items():
        for line in reader.rest():
            yield source, line


class _Reader:
    """One source of a growing run: whole lines only, and then those of the next attempt."""

    def __init__(self, run_dir: Path, source: int | str, attempt: int) -> None:
        self._run_dir, self._source, self._attempt = run_dir, source, attempt
        self._position, self._rest = 0, b""

    def new(self) -> Iterator[str]:
        """Lines that came since the last call; at the end of one attempt it continues with the next."""
        chunk, self._position = _read_from(path(self._run_dir, self._attempt, self._source), self._position)
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        yield from (line.decode(errors="replace") for line in whole)
        if not chunk and (later := self._later()):
            yield from self.rest()
            self._attempt, self._position = later[0], 0
            yield from self.new()

    def rest(self) -> Iterator[str]:
        """A last line without a line end."""
        rest, self._rest = self._rest, b""
        if rest:
            yield rest.decode(errors="replace")

    def _later(self) -> list[int]:
        numbers = attempts(self._run_dir)
        return [n for n in numbers if n > self._attempt and path(self._run_dir, n, self._source).exists()]


def events(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The newest events, oldest first; lines that a crash cut in half are skipped."""
    try:
        with (run_dir / rundir.EVENTS).open("rb") as stream:
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
