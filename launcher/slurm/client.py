"""Questions to Slurm's own commands about jobs, and what its words mean; each failure is a `Fault`.

Nothing is cached, and output is asked for in explicit formats, never read from tables made for people.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from launcher.errors import Fault
from launcher.host.base import TIMEOUT, Host

# Everything else (PENDING, COMPLETING, SIGNALING, REQUEUED, ...) may still turn into something.
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
    form = "%i|%T|%N|%S|%L|%r|%o"
    arguments = ("--noheader", "--states=all", "--me", f"--format={form}")
    jobs = {}
    for line in host.call("squeue", *arguments, timeout=timeout).splitlines():
        job, state, nodes, start, left, reason, command = line.split("|", 6)
        jobs[job] = JobState(
            id=job,
            state=state,
            nodes=nodes,
            start=_known(start),
            time_left=_known(left),
            reason=_known(reason),
            command=command,
        )
    return jobs


def accounting(ids: Iterable[str], host: Host) -> dict[str, JobState]:
    """The same from sacct for `ids`, however old; `Fault` where the cluster keeps no accounts."""
    fields = "JobIDRaw,State,NodeList,Start,ExitCode"
    jobs = ",".join(ids)
    if not jobs:
        return {}
    arguments = ("--allocations", "--noheader", "--parsable2", f"--jobs={jobs}", f"--format={fields}")
    found = {}
    for line in host.call("sacct", *arguments).splitlines():
        job, state, nodes, start, code = line.split("|")
        # "CANCELLED by 1000" -> CANCELLED
        found[job] = JobState(
            id=job, state=state.split()[0], nodes=_known(nodes), start=_known(start), exit_code=code
        )
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
