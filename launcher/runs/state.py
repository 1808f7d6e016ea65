"""What a job is doing: asked of Slurm or this machine's processes, and of the run's own logs where both are mute.

Ending a job is here too, because both need to know which processes are a run's.
"""

import json
import re
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.common import processes
from launcher.errors import Fault
from launcher.host import copies, ssh
from launcher.runs import logs
from launcher.slurm import client

SCRIPT = "job.sbatch"
MARK = "MIXLAUNCH_RUN"  # in the environment of every process of a local run, with the run directory as its value
FAREWELL = 35  # seconds that a cancelled local run gets: its script gives the ranks thirty
LOOK_TIMEOUT = 15
LAST_WORD = re.compile(r"^mixlaunch: (?P<reason>.*?)(?:; exit (?P<code>\d+)|; (?P<again>requeued|starting again))$")
ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
WHY_ENDED = {
    "TIME LIMIT": "TIMEOUT",
    "NODE FAILURE": "NODE_FAIL",
    "PREEMPTION": "PREEMPTED",
    "JOB REQUEUE": "PREEMPTED",
}
UNKNOWN = "UNKNOWN"  # nobody answers
GONE = "ENDED"  # nobody has it any more, and it left no last word


@dataclass(frozen=True, kw_only=True)
class State:
    """`state` in Slurm's words, for local jobs too; `source` says who told: slurm, processes or logs."""

    state: str
    source: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    time_left: str = ""
    exit_code: int | None = None

    @property
    def active(self) -> bool:
        """Whether the job may still do something, as far as anyone knows."""
        return self.state != GONE and self.state not in client.ENDED

    @property
    def resumable(self) -> bool:
        """Whether it makes sense to run it again."""
        return not self.active and self.state != "COMPLETED"


def of_slurm(jobs: Mapping[Path, str], environment: Mapping[str, str]) -> dict[Path, State]:
    """State of every run directory's job on one cluster; from logs alone where Slurm has forgotten or is silent."""
    try:
        known = client.states(jobs.values(), environment)
    except Fault as fault:
        return {run: from_logs(run, UNKNOWN, f"Slurm is silent: {fault}") for run in jobs}
    return {run: _merged(run, job, known.get(job)) for run, job in jobs.items()}


def of_local(run_dir: Path, host: str, *, cancelled: bool = False) -> State:
    """State of a local run: its processes are looked for on this machine, its end is in its log."""
    if host == socket.gethostname() and is_running(run_dir):
        return State(state="RUNNING", source="processes", nodes=host)
    if host != socket.gethostname():
        return from_logs(run_dir, UNKNOWN, f"it was started on {host}")
    found = from_logs(run_dir, "FAILED", "it was killed: its log has no last word")
    return replace(found, state="CANCELLED") if cancelled else found


def from_logs(run_dir: Path, otherwise: str, why: str) -> State:
    """What the newest attempt's last word says, a finished job's exit code; without one, `otherwise` and `why`."""
    batches = [logs.path(run_dir, attempt, logs.BATCH) for attempt in logs.attempts(run_dir)]
    written = [log for log in batches if log.exists()]
    lines = written[-1].read_text(errors="replace").splitlines() if written else []
    for line in reversed(lines):
        if match := LAST_WORD.match(line):
            if match["again"]:
                break
            code = int(match["code"])
            state = "FAILED" if code else "COMPLETED"
            return State(state=state, source="logs", reason=match["reason"], exit_code=code)
    return State(state=otherwise, source="logs", reason=why)


def from_output(run_dir: Path, job_id: str) -> str | None:
    """How Slurm ended the job's last attempt, from what it wrote into the job's own output; None if it didn't."""
    try:
        text = (run_dir / "logs" / f"slurm-{job_id}.out").read_text(errors="replace")
    except OSError:
        return None
    if match := ENDED_BY_SLURM.search(text[text.rfind("mixlaunch: attempt") :]):
        return WHY_ENDED.get(match[1] or "", "CANCELLED")
    return None


def is_running(run_dir: Path) -> bool:
    """Whether any process of a local run is alive on this machine."""
    return bool(processes.marked(**{MARK: str(run_dir)}))


def find_job(script: Path, environment: Mapping[str, str]) -> str | None:
    """The id of the job of `script` that its run doesn't know yet, if Slurm has one; `Fault` if it's silent."""
    path, known = str(copies.original(script)), _recorded(script, environment)
    queue = client.queue(environment, timeout=LOOK_TIMEOUT).values()
    found = [job.id for job in queue if job.command == path and job.id not in known]
    return max(found, key=int, default=None)


def _recorded(script: Path, environment: Mapping[str, str]) -> list[str]:
    """The jobs in the record beside `script`, or beside its copy."""
    login = environment.get(ssh.LOGIN)
    here = script if copies.login_of(script) or not login else copies.place(ssh.Login.decoded(login), script)
    try:
        return list(json.loads((here.parent / "run.json").read_text())["jobs"])
    except (OSError, ValueError, KeyError):
        return []


def cancel_slurm(job_ids: Iterable[str], environment: Mapping[str, str]) -> None:
    """Ask Slurm to end jobs; `Fault` if it refuses."""
    client.call("scancel", *job_ids, environment=environment)


def cancel_local(run_dir: Path, job_id: str) -> None:
    """End a local run: its script first, which lets the ranks leave, then by force whatever is left of it."""

    def everything() -> list[int]:
        return processes.marked(**{MARK: str(run_dir)})

    processes.send(lambda: [pid for pid in everything() if str(pid) == job_id], signal.SIGTERM)
    if processes.wait(everything, FAREWELL) and (left := processes.stop(everything, grace=1)):
        raise Fault(f"these processes can't be ended: {left}")


def _merged(run_dir: Path, job_id: str, job: client.JobState | None) -> State:
    if job is None:
        found = from_logs(run_dir, GONE, "Slurm has forgotten it")
        ended = from_output(run_dir, job_id)
        return replace(found, state=ended) if ended and found.state != "COMPLETED" else found
    code = None if job.active else from_logs(run_dir, GONE, "").exit_code
    if code is None and job.exit_code:  # Slurm's own is the lesser source: it makes 9 of a script's 137
        code = int(job.exit_code.split(":")[0])
    return State(
        state=job.state,
        source="slurm",
        reason=job.reason,
        nodes=job.nodes,
        start=job.start,
        time_left=job.time_left if job.active else "",
        exit_code=code,
    )
