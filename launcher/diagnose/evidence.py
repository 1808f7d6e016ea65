"""Collects what an attempt left behind: the host's log, the ranks' logs, and which rank left first.

It is only read here, and of long logs only the end. `judge` says what it means.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from launcher.common import shared_files
from launcher.errors import UsageError
from launcher.runs import logs, states
from launcher.runs.logs import Leaver
from launcher.runs.record import Run
from launcher.runs.states import State
from launcher.slurm import hostlist
from megatron_mixtral.spec import rundir

TAIL = 100_000  # bytes at the end of a log that are read
COUNTED = 50_000_000
PLACED = re.compile(r"^mixlaunch: \d+ ranks on (?P<nodes>[^,]\S*), rendezvous", re.M)
ATTEMPT = re.compile(r"^mixlaunch: attempt (\d+) logs to ")


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a log, and where it is; numbers count from 1, and very long logs have none."""

    text: str
    log: Path
    number: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One attempt. `state` is Slurm's state of the job if this is the last attempt, else empty."""

    attempt: int | None
    state: str = ""
    exit_code: int | None = None
    first: Leaver | None = None
    nodes: tuple[str, ...] = ()
    tasks_per_node: int = 1
    host: tuple[Line, ...] = ()
    ranks: Mapping[int, tuple[Line, ...]] = field(default_factory=dict)
    last_word: str = ""

    def node_of(self, rank: int | None) -> str:
        """The node of a rank: ranks fill the nodes in order."""
        if self.first and rank == self.first.rank:
            return self.first.node
        place = None if rank is None else rank // self.tasks_per_node
        return self.nodes[place] if place is not None and place < len(self.nodes) else ""


def of_attempt(run: Run, attempt: int | None, state: State | None = None) -> Evidence:
    """The evidence of `attempt`; give `state`, the job's state, only for the last attempt."""
    word, code = (state.state, state.exit_code) if state else ("", None)
    if attempt is None:
        return Evidence(attempt=None, state=word, exit_code=code, host=_output(run, None))
    batch = _tail(logs.path(run.path, attempt, logs.BATCH))
    text = "\n".join(line.text for line in batch)
    return Evidence(
        attempt=attempt,
        state=word,
        exit_code=_code(batch) if code is None else code,
        first=logs.first_to_leave(run.path, attempt),
        nodes=_nodes(text, state),
        tasks_per_node=int(run.record.get("tasks_per_node", 1)),
        host=(*_output(run, attempt), *batch),
        ranks={rank: _tail(logs.path(run.path, attempt, rank)) for rank in logs.ranks(run.path, attempt)},
        last_word=_last_word(batch),
    )


def _nodes(text: str, state: State | None) -> tuple[str, ...]:
    match = PLACED.search(text)
    try:
        return tuple(hostlist.expand(match["nodes"] if match else state.nodes if state else ""))
    except UsageError:
        return ()


def _output(run: Run, attempt: int | None) -> tuple[Line, ...]:
    """Slurm's messages in the job's output during `attempt`."""
    found: list[Line] = []
    for job in run.job_ids:
        current: int | None = None
        for line in _tail(run.path / rundir.LOGS / f"slurm-{job}.out"):
            if match := ATTEMPT.match(line.text):
                current = int(match[1])
            elif current == attempt:
                found.append(line)
    return tuple(found)


def _code(lines: tuple[Line, ...]) -> int | None:
    match = states.LAST_WORD.match(_last_word(lines))
    return int(match["code"]) if match and match["code"] else None


def _last_word(lines: tuple[Line, ...]) -> str:
    return next((line.text for line in reversed(lines) if states.LAST_WORD.match(line.text)), "")


def _tail(log: Path) -> tuple[Line, ...]:
    """The end of a log; a line that begins before it is left out."""
    try:
        with shared_files.opened(log) as stream:
            start = max(0, stream.seek(0, 2) - TAIL)
            before = _line_ends(log, start)
            stream.seek(start)
            lines = stream.read(TAIL).decode(errors="replace").removesuffix("\n").split("\n")
    except OSError:
        return ()
    skipped = 1 if start else 0
    return tuple(
        Line(text=text.rstrip("\r"), log=log, number=before + place if before is not None else None)
        for place, text in enumerate(lines[skipped:], start=1 + skipped)
    )


def _line_ends(log: Path, size: int) -> int | None:
    """How many lines end in the first `size` bytes; of very long logs they aren't counted."""
    if size > COUNTED:
        return None
    count = 0
    with shared_files.opened(log) as stream:
        while size > 0 and (chunk := stream.read(min(size, 1 << 20))):
            count += chunk.count(b"\n")
            size -= len(chunk)
    return count
