"""Questions to Slurm's own commands about jobs, and what its words mean; each failure is a `Fault`.

Nothing is cached. Output is requested in explicit formats, and never parsed from tables for people. A job may hold
any text in its arguments, and a site may print notices of its own: what isn't a record is no record.
"""

import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

from launcher.common import quoting
from launcher.errors import Fault, UsageError
from launcher.host.base import TIMEOUT, Host
from launcher.slurm import hostlist

# Every other state (PENDING, COMPLETING, SIGNALING, REQUEUED, ...) may still change.
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",  # and not requeued
    "REVOKED",
}

ID = r"[0-9][0-9_+,.%\[\]-]*"  # of an array's or a mixed job's parts too: 7_[1-9%2], 7+1
# id, state, nodes, start, time left, reason and command: the last may hold anything, line breaks too.
QUEUED = re.compile(rf"({ID})\|([A-Z_]+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|(.*)", re.DOTALL)
ACCOUNTED = re.compile(rf"({ID})\|([A-Z_]+)[^|]*\|([^|]*)\|([^|]*)\|([0-9]+:[0-9]+)")  # CANCELLED by 1000


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says about one job. Times are Slurm's local text, empty where it doesn't know."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    time_left: str = ""
    exit_code: str = ""  # CODE:SIGNAL of the batch script
    command: str = ""  # the script's path

    @property
    def active(self) -> bool:
        """Whether the job may still do something."""
        return self.state not in ENDED


def queue(host: Host, *, timeout: float = TIMEOUT) -> dict[str, JobState]:
    """This user's jobs that the controller still knows, the lately finished too, by id."""
    mark = secrets.token_hex(8)  # no job's text holds it, so that records are told from everything else
    form = f"{mark}%i|%T|%N|%S|%L|%r|%o{mark}"
    arguments = ("--noheader", "--states=all", "--me", f"--format={form}")
    return queued(host.call("squeue", *arguments, timeout=timeout), mark)


def queued(text: str, mark: str) -> dict[str, JobState]:
    """The jobs between the marks, by id; `Fault` if a record is damaged, because a job may be missing then."""
    _, *pieces = text.split(mark)
    if len(pieces) % 2:
        raise Fault(f"squeue: its answer ends within a job: {quoting.shown(pieces[-1])}")
    return {job.id: job for job in map(_queued, pieces[::2])}


def _queued(record: str) -> JobState:
    match = QUEUED.fullmatch(record)
    if match is None:
        raise Fault(f"squeue: this isn't a job: {quoting.shown(record)}")
    job, state, nodes, start, left, reason, command = match.groups()
    return JobState(
        id=job,
        state=state,
        nodes=_nodes(nodes),
        start=_known(start),
        time_left=_known(left),
        reason=_known(reason),
        command=command,
    )


def accounting(ids: Iterable[str], host: Host) -> dict[str, JobState]:
    """The same from sacct for `ids`, however old; `Fault` where the cluster keeps no accounts."""
    fields = "JobIDRaw,State,NodeList,Start,ExitCode"
    wanted = list(ids)
    if not wanted:
        return {}
    arguments = ("--allocations", "--noheader", "--parsable2", f"--jobs={','.join(wanted)}", f"--format={fields}")
    found = accounted(host.call("sacct", *arguments))
    return {job: state for job, state in found.items() if job in wanted}


def accounted(text: str) -> dict[str, JobState]:
    """The jobs among the lines of sacct, by id; `Fault` if one is damaged."""
    found = {}
    for line in text.splitlines():
        if not re.match(rf"{ID}\|", line):
            continue
        match = ACCOUNTED.fullmatch(line)
        if match is None:
            raise Fault(f"sacct: this isn't a job: {quoting.shown(line)}")
        job, state, nodes, start, code = match.groups()
        found[job] = JobState(id=job, state=state, nodes=_nodes(nodes), start=_known(start), exit_code=code)
    return found


def states(ids: Iterable[str], host: Host) -> dict[str, JobState]:
    """Every one of `ids` that Slurm still knows; `Fault` only if neither the controller nor the accounts answer."""
    wanted = list(ids)
    faults: list[Fault] = []
    found: dict[str, JobState] = {}
    try:
        found = {job: state for job, state in queue(host).items() if job in wanted}
    except Fault as fault:
        faults.append(fault)
    if forgotten := [job for job in wanted if job not in found]:
        try:
            found |= accounting(forgotten, host)
        except Fault as fault:
            faults.append(fault)
    if len(faults) == 2:
        raise faults[0]
    return found


def seconds(time: str) -> int:
    """Slurm's time (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; `ValueError` for UNLIMITED."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest = parts
    else:
        hours, minutes, rest = (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _known(text: str) -> str:
    return "" if text in ("N/A", "None", "Unknown", "(null)", "None assigned", "INVALID") else text


def _nodes(text: str) -> str:
    """A list of nodes; nothing for what can't be one."""
    try:
        hostlist.expand(_known(text))
    except UsageError:
        return ""
    return _known(text)
