"""From evidence to a finding: what ended an attempt, with which rank and node it began, which lines say so (pure).

What the host says counts first, then ranks that failed by themselves, then ranks that lost another one (a secondary
failure). What a log says counts before an exit code.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.diagnose.causes import table
from launcher.diagnose.causes.cause import Cause
from launcher.diagnose.causes.host import HOST
from launcher.diagnose.causes.rank import RANK
from launcher.diagnose.evidence import Evidence, Line
from launcher.errors import UsageError
from launcher.planning import requeue
from launcher.slurm import hostlist
from megatron_mixtral.spec import rundir

RECENT = 200  # lines at the end of a rank's log; the rank survived anything before them
SHOWN = 8
UNDERLINE = re.compile(r"^[\s~^]+$")
PREFIX = re.compile(r"^\[rank\d+\]:\s?")
FRAME = re.compile(r'^\s+File "')
COMMAND = re.compile(r"\s+\(\s*trap .*")
KILLED = re.compile(r"^\S*bash: line \d+:\s+\d+ \w")  # what the shell says of a rank that a signal ended
SIGNALS = range(129, 160)
# Exit codes of ranks that were ended from outside; they say nothing about the cause.
ENDED_BY_OTHERS = (rundir.DONE, 15, 137, 143, rundir.REQUEUE)
# All ranks were told to leave with these, so the first one to do it means nothing.
TOLD_TO_LEAVE = (15, rundir.REQUEUE, 130, 143)
NOT_FIRST = ("time_limit", "preempted")  # a rank may have failed before one of these ended the job

Symptom = tuple[int, Cause]  # the place of a line in a rank's log, and the cause it speaks of
Symptoms = Mapping[int, Symptom]  # by rank


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why an attempt ended. `secondary` ranks only lost another one, `silent` ranks said nothing at all."""

    cause: Cause
    attempt: int | None = None
    rank: int | None = None
    code: int | None = None
    nodes: tuple[str, ...] = ()
    lines: tuple[Line, ...] = ()
    first_rank: int | None = None
    secondary: tuple[int, ...] = ()
    silent: tuple[int, ...] = ()
    node_to_blame: bool = False
    notes: tuple[str, ...] = ()

    @property
    def brief(self) -> str:
        """What happened, and with which rank on which node it began."""
        rank = f"rank {self.rank}" if self.rank is not None else ""
        where = " on ".join(filter(None, [rank, hostlist.compress(self.nodes)]))
        return f"{self.cause.title}{f': {where}' if where else ''}"

    @property
    def bad_nodes(self) -> tuple[str, ...]:
        """Nodes that are to blame."""
        return self.nodes if self.cause.bad_node or self.node_to_blame else ()


def judge(evidence: Evidence) -> Finding | None:
    """What ended the attempt; None if it succeeded."""
    if re.search(r"exit 0$", evidence.last_word):
        return None
    found = _found(evidence)
    first = evidence.first
    code = first.code if first else evidence.exit_code
    notes = tuple(_notes(evidence, found))
    return replace(
        found,
        attempt=evidence.attempt,
        code=code if found.code is None else found.code,
        first_rank=first.rank if first else None,
        notes=notes,
    )


def _found(evidence: Evidence) -> Finding:
    if evidence.state == "CANCELLED":
        lines = [line for line in evidence.host if "CANCELLED AT" in line.text]
        return Finding(cause=table.CANCELLED, lines=tuple(lines[:SHOWN]))
    symptoms = {rank: _best(lines) for rank, lines in evidence.ranks.items()}
    secondary = {rank: best for rank, best in symptoms.items() if best and best[1].secondary}
    host, rank = _of_host(evidence), _of_ranks(evidence, symptoms, secondary)
    own = rank is not None and not rank.cause.secondary
    ended = evidence.first is None or evidence.first.code in ENDED_BY_OTHERS
    if host and not (own and not ended and host.cause.name in NOT_FIRST):
        return host
    lost = None if own or not ended else _of_lost_node(evidence)
    return lost or rank or _of_code(evidence, tuple(secondary)) or _of_nothing(evidence)


# --- the host ----------------------------------------------------------------------------------------------------


def _of_host(evidence: Evidence) -> Finding | None:
    for cause in (*HOST, *RANK):
        matches = [(line, match) for line in evidence.host if (match := cause.match_host(line.text))]
        if matches or evidence.state in cause.states:
            return _host_finding(cause, matches)
    return None


def _host_finding(cause: Cause, matches: "list[tuple[Line, re.Match[str]]]") -> Finding:
    groups = [match.groupdict() for _, match in matches]
    nodes = [name for group in groups for name in _expanded(group.get("node"))]
    ranks = [int(group["rank"]) for group in groups if group.get("rank")]
    rank = ranks[0] if ranks else None
    lines = {line.text: line for line, _ in matches}
    return Finding(
        cause=cause,
        rank=rank,
        nodes=tuple(dict.fromkeys(nodes)),
        lines=tuple(lines.values())[:SHOWN],
    )


def _of_lost_node(evidence: Evidence) -> Finding | None:
    """A node whose ranks were all killed, while the ranks of other nodes were told to end."""
    first = evidence.first
    if first and first.code == 137:
        return None
    matches = [(line, match) for line in evidence.host if (match := table.NODE_LOST.match_host(line.text))]
    others = [found for found in matches if not first or found[1]["node"] != first.node]
    return _host_finding(table.NODE_LOST, others[:1]) if others else None


def _expanded(text: str | None) -> list[str]:
    try:
        return hostlist.expand((text or "").strip(" :,"))
    except UsageError:
        return []


# --- the ranks ---------------------------------------------------------------------------------------------------


def _of_ranks(evidence: Evidence, symptoms: Mapping[int, Symptom | None], secondary: Symptoms) -> Finding | None:
    own = {rank: best for rank, best in symptoms.items() if best and not best[1].secondary}
    silent = tuple(rank for rank, best in symptoms.items() if best is None)
    first = evidence.first
    if first and first.rank in own:
        return _rank_finding(evidence, first.rank, own[first.rank], secondary)
    if first and first.code in SIGNALS and first.code not in ENDED_BY_OTHERS:
        return None  # the exit code says more than the messages of other ranks
    if own:
        rank = min(own, key=lambda rank: (_precedence(own[rank][1]), rank))
        return _rank_finding(evidence, rank, own[rank], secondary)
    if first and first.code == 137:
        return None
    return _only_secondary(evidence, secondary, silent) if secondary else None


def _rank_finding(
    evidence: Evidence, rank: int, best: Symptom, secondary: Iterable[int], silent: tuple[int, ...] = ()
) -> Finding:
    place, cause = best
    node = evidence.node_of(rank)
    return Finding(
        cause=cause,
        rank=rank,
        nodes=(node,) if node else (),
        lines=excerpt(evidence.ranks[rank], place),
        secondary=tuple(other for other in secondary if other != rank),
        silent=silent,
    )


def _only_secondary(evidence: Evidence, secondary: Symptoms, silent: tuple[int, ...]) -> Finding:
    """Every rank that spoke had lost another one: a silent rank failed first, or a node with all its ranks."""
    first = evidence.first
    speaker = first.rank if first and first.rank in secondary else min(secondary)
    found = _rank_finding(evidence, speaker, secondary[speaker], secondary, silent)
    if not silent:
        return found
    nodes = tuple(dict.fromkeys(filter(None, map(evidence.node_of, silent))))
    speaking = {evidence.node_of(rank) for rank in secondary}
    whole = len(nodes) == 1 and nodes[0] not in speaking
    return replace(found, rank=silent[0], nodes=nodes, node_to_blame=whole, secondary=tuple(secondary))


def _best(lines: Sequence[Line]) -> Symptom | None:
    """The most telling of a log's last lines: secondary failures last, else in the order of the table."""
    start = max(0, len(lines) - RECENT)
    found = [(start + place, cause) for place, cause in table.of_rank_lines(line.text for line in lines[start:])]
    return min(found, key=lambda item: (item[1].secondary, _precedence(item[1]), -item[0]), default=None)


def _precedence(cause: Cause) -> int:
    order = (*HOST, *RANK, table.EXCEPTION)
    return order.index(cause)


def excerpt(lines: Sequence[Line], place: int) -> tuple[Line, ...]:
    """The line at `place`, the two frames of a traceback above it that matter, and the lines that follow."""
    after = [line for line in lines[place + 1 : place + 3] if line.text.strip() and not KILLED.match(line.text)]
    return tuple(replace(line, text=_plain(line)) for line in [*_frames(lines[:place]), lines[place], *after])


def _frames(before: Sequence[Line]) -> list[Line]:
    """From a traceback that ends here: the last frame outside of installed packages, and the last one of all."""
    indented: list[Line] = []
    for line in reversed(before):
        if not _plain(line).startswith("  "):
            break
        if not UNDERLINE.match(_plain(line)):
            indented.insert(0, line)
    starts = [place for place, line in enumerate(indented) if FRAME.match(_plain(line))]
    own = [place for place in starts if "site-packages" not in indented[place].text]
    chosen = sorted({*own[-1:], *starts[-1:]})
    return [line for place in chosen for line in indented[place : place + 2]]


def _plain(line: Line) -> str:
    """The line without torch's prefix, and without our own script where the shell reports a killed rank."""
    return COMMAND.sub("", PREFIX.sub("", line.text))


# --- codes, and nothing at all -----------------------------------------------------------------------------------


def _of_code(evidence: Evidence, secondary: tuple[int, ...]) -> Finding | None:
    first = evidence.first
    code = first.code if first else evidence.exit_code
    if not code:
        return None
    rank = first.rank if first else None
    cause = table.of_code(code) or table.UNKNOWN
    lines = _last_lines(evidence.ranks.get(rank, ()) if rank is not None else evidence.host)
    if first is None or code in TOLD_TO_LEAVE:
        return Finding(cause=cause, lines=lines, code=code, secondary=secondary)
    return Finding(cause=cause, rank=rank, nodes=(first.node,), lines=lines, code=code, secondary=secondary)


def _of_nothing(evidence: Evidence) -> Finding:
    if evidence.attempt is None and evidence.state not in ("", "UNKNOWN"):
        return Finding(cause=table.NO_OUTPUT, lines=_last_lines(evidence.host))
    killed = evidence.state == "FAILED" and not evidence.last_word
    return Finding(cause=table.SCRIPT_KILLED if killed else table.UNKNOWN, lines=_last_lines(evidence.host))


def _last_lines(lines: Sequence[Line]) -> tuple[Line, ...]:
    return tuple(replace(line, text=_plain(line)) for line in lines if line.text.strip())[-SHOWN:]


def _notes(evidence: Evidence, found: Finding) -> Iterable[str]:
    if match := requeue.GAVE_UP.search(evidence.last_word):
        yield f"not tried again: {match[1]}"
    elif "scontrol requeue failed" in evidence.last_word:
        yield "it asked to be requeued, and Slurm refused"
    elif "ended from outside" in evidence.last_word and found.cause.name == "terminated":
        yield "Slurm was already ending the job"
    first = evidence.first
    if first and found.rank is not None and first.rank != found.rank:
        yield f"rank {first.rank} on {first.node} left first, with exit code {first.code}, but it isn't the cause"
