"""Reads a run's logs: one file for each rank and attempt, the batch script's log, and the events.

Large files aren't read whole: a tail is read from the end. `follow` continues with the next attempt.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.common import schema, shared_files
from launcher.errors import UsageError
from megatron_mixtral.spec import rundir

TAIL = 65_536  # bytes at the end of events.jsonl that hold the newest event of each kind
BATCH = "batch"
POLL = 0.3
LINE = 1 << 20  # bytes; a longer line comes in parts
WORD = 4096  # bytes of a file that holds one line
NUMBER = re.compile(r"[0-9]{1,7}", re.ASCII)
VALUE = schema.either(schema.number, schema.text)  # `nan` and `inf` come as text
EVENT = {  # what is read of an event; whoever writes one may add to it
    "time": schema.number,
    "step": schema.whole,
    "steps": schema.whole,
    "loss": VALUE,
    "tokens_per_s": VALUE,
    "done": schema.number,
    "total": schema.number,
    "unit": schema.text,
    "left": schema.maybe(schema.number),
    "seconds": VALUE,
    "text": schema.text,
    "url": schema.text,
    "node": schema.text,
    "reason": schema.text,
}
OF_KIND = {"step": ("step",), "progress": ("done", "total"), "ready": ("url",)}
TERMINATED = 143


@dataclass(frozen=True, kw_only=True)
class Leaver:
    """The first rank that left with a code."""

    code: int
    rank: int
    node: str


def attempts(run_dir: Path) -> list[int]:
    """Numbers of the attempts that left logs, in order."""
    names = (path.name.removeprefix(rundir.ATTEMPT) for path in (run_dir / rundir.LOGS).glob(f"{rundir.ATTEMPT}*"))
    return sorted(int(name) for name in names if NUMBER.fullmatch(name))


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
    """A log line by line, however long it is; line ends are left out, and what isn't UTF-8 is marked."""
    with shared_files.opened(log) as stream:
        while line := stream.readline(LINE):
            yield line.rstrip(b"\r\n").decode(errors="replace")


def ranks(run_dir: Path, attempt: int) -> list[int]:
    """Ranks that left a log in that attempt, in order."""
    names = (path.stem.removeprefix("rank_") for path in path(run_dir, attempt, BATCH).parent.glob("rank_*.log"))
    return sorted(int(name) for name in names if NUMBER.fullmatch(name))


def first_to_leave(run_dir: Path, attempt: int) -> Leaver | None:
    """The rank that left an attempt first; None if all are running, or none has started."""
    try:
        word = shared_files.read(path(run_dir, attempt).parent / rundir.FIRST_EXIT, most=WORD)
        code, rank, node = word.decode().split()
        # bash says -1 of a child that ended while its own signal handler ran: by the TERM that was passed on.
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
        with shared_files.opened(run_dir / rundir.EVENTS) as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - TAIL))
            lines = stream.read(TAIL).split(b"\n")
    except OSError:
        return
    for line in lines if size <= TAIL else lines[1:]:
        if event := event_of(line):
            yield event


def event_of(line: bytes) -> dict[str, Any] | None:
    """The event of a line; None for a line that is cut, and for values that no job writes."""
    try:
        event = shared_files.parsed(line)
    except ValueError:
        return None
    if schema.misfit(event, {"event": schema.text}, EVENT):
        return None
    missing = [key for key in OF_KIND.get(event["event"], ()) if key not in event]
    return None if missing else dict(event)


def newest(run_dir: Path) -> dict[str, dict[str, Any]]:
    """The newest event of each kind: step, eval, checkpoint, ready, progress, exit."""
    return {str(event["event"]): event for event in events(run_dir)}


def _read_from(log: Path, position: int) -> tuple[bytes, int]:
    try:
        with shared_files.opened(log) as stream:
            stream.seek(position)
            chunk = stream.read(1 << 20)
    except OSError:
        return b"", position
    return chunk, position + len(chunk)
