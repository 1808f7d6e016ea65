"""What runs are doing: asked of Slurm or this machine's processes, and of their own logs where both are mute.

Ending a job is here too, because it also needs to know which processes belong to a run.
"""

import re
import signal
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.common import processes, shared_files
from launcher.errors import Fault, UsageError
from launcher.host.base import Host
from launcher.runs import logs, record
from launcher.runs.record import Run
from launcher.slurm import client
from megatron_mixtral.spec import rundir

MARK = "MIXLAUNCH_RUN"  # in the environment of every process of a local run, with the run directory as its value
FAREWELL = 35  # seconds that a cancelled local run gets: its script gives the ranks thirty
LOOK_TIMEOUT = 15
END = 1 << 20  # bytes at the end of a log that hold its last word
LAST_WORD = re.compile(r"^mixlaunch: (?P<reason>.*?)(?:; exit (?P<code>\d+)|; (?P<again>requeued|starting again))$")
ENDED_BY_SLURM = re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+(?: DUE TO ([A-Z ]+))?")
WHY_ENDED = {
    "TIME LIMIT": "TIMEOUT",
    "NODE FAILURE": "NODE_FAIL",
    "PREEMPTION": "PREEMPTED",
    "JOB REQUEUE": "PREEMPTED",
}
SUBMITTED = re.compile(r"^Submitted batch job (\d+)", re.MULTILINE)
SUBMITTING = "SUBMITTING"  # nobody recorded how its submission ended
UNKNOWN = "UNKNOWN"  # nobody answers
NEVER = "DependencyNeverSatisfied"  # Slurm's reason for a job that waits for one that failed
GONE = "ENDED"  # the scheduler has forgotten it, and its log has no end


@dataclass(frozen=True, kw_only=True)
class State:
    """`state` in Slurm's words, also for local jobs; `source` is slurm, processes or logs."""

    state: str
    source: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    time_left: str = ""
    exit_code: int | None = None

    @property
    def active(self) -> bool:
        """Whether the job may still do something, as far as it is known."""
        return self.state != GONE and self.state not in client.ENDED

    @property
    def resumable(self) -> bool:
        """Whether it makes sense to run it again."""
        return not self.active and self.state != "COMPLETED"


def of_run(run: Run) -> State:
    """What one run is doing."""
    return of_runs([run])[run.path]


def of_runs(runs: Sequence[Run]) -> dict[Path, State]:
    """The state of each run, with one query for each cluster."""
    found: dict[Path, State] = {}
    hosts: dict[Host, dict[Path, str]] = {}
    for run in runs:
        if run.stranger:
            found[run.path] = from_logs(run.path, UNKNOWN, f"it is {run.stranger}; no scheduler was asked")
            continue
        current = _adopted(run) if run.submitting else run
        if current.submitting or current.job_id is None:
            found[run.path] = State(state=SUBMITTING, source="record", reason="its submission never finished")
        elif run.is_local:
            host, cancelled = str(run.record["host"]), bool(run.record["cancelled"])
            found[run.path] = of_local(run.path, host, cancelled=cancelled)
        else:
            hosts.setdefault(run.host, {})[run.path] = current.job_id
    for cluster, jobs in hosts.items():
        found |= of_slurm(jobs, cluster)
    return {run.path: _cancelled(run, found[run.path]) for run in runs}


def _cancelled(run: Run, state: State) -> State:
    """A run that we cancelled counts as cancelled when Slurm has forgotten it, whatever its logs say."""
    forgotten = run.record["cancelled"] and state.source == "logs" and not state.active
    return replace(state, state="CANCELLED") if forgotten and state.state != "COMPLETED" else state


def stuck(found: Sequence[Run]) -> list[Run]:
    """Those that can never start: a job that they wait for failed, or can't start itself."""
    found = [run for run in found if not run.stranger]
    told = of_runs(found)
    waiting = [run for run in found if told[run.path].state == "PENDING"]
    never = [run for run in waiting if told[run.path].reason == NEVER]
    while True:
        ids = {run.job_id for run in never}
        behind = [run for run in waiting if run not in never and ids & _waits_for(run)]
        if not behind:
            return never
        never += behind


def _waits_for(run: Run) -> set[str]:
    link = run.record.get("pipeline")
    return set(link["jobs"]) if link else set()


def cancel(run: Run) -> bool:
    """End the run's job; False if it has ended already. `Fault` if the scheduler refuses."""
    record.require_own(run)
    current = _adopted(run) if run.submitting else run
    if current.submitting or current.job_id is None or not of_run(current).active:
        return False
    if run.is_local and socket.gethostname() != run.record["host"]:
        raise UsageError(f"{run.name} runs on {run.record['host']}; cancel it there")
    if run.is_local:
        record.changed(current, cancelled=True)
        cancel_local(run.path, current.job_id)
    else:
        cancel_slurm([current.job_id], run.host)
        record.changed(current, cancelled=True)
    return True


def _adopted(run: Run) -> Run:
    """A run whose submission was cut off: its job, if Slurm has one, is found by its script's path."""
    run = record.reread(run)  # somebody may have found it already
    if run.stranger or run.is_local or not run.submitting:
        return run
    try:
        noted = _noted(run)
        told = noted is not None and noted not in run.job_ids
        job_id = noted if told else find_job(run.path / rundir.SCRIPT, run.host)
    except Fault:
        return run
    return record.with_job(run, job_id) if job_id else run


def _noted(run: Run) -> str | None:
    """The job that sbatch told of where it ran, though we didn't hear it."""
    match = SUBMITTED.search(run.host.noted(run.path / rundir.SCRIPT, len(run.job_ids)))
    return match[1] if match else None


def of_slurm(jobs: Mapping[Path, str], host: Host) -> dict[Path, State]:
    """State of every run directory's job on one cluster; from its logs if Slurm doesn't know it or answer."""
    try:
        known = client.states(jobs.values(), host)
    except Fault as fault:
        return {run: from_logs(run, UNKNOWN, f"Slurm doesn't answer: {fault}") for run in jobs}
    return {run: _merged(run, job, known.get(job)) for run, job in jobs.items()}


def of_local(run_dir: Path, host: str, *, cancelled: bool = False) -> State:
    """State of a local run: from its processes on this machine, or from the end of its log."""
    if host == socket.gethostname() and is_running(run_dir):
        return State(state="RUNNING", source="processes", nodes=host)
    if host != socket.gethostname():
        return from_logs(run_dir, UNKNOWN, f"it was started on {host}")
    found = from_logs(run_dir, "FAILED", "it was killed: its log stops before its end")
    return replace(found, state="CANCELLED") if cancelled else found


def from_logs(run_dir: Path, otherwise: str, why: str) -> State:
    """The state at the end of the newest attempt's log, with the exit code; without such an end, `otherwise` and
    `why`.
    """
    batches = [logs.path(run_dir, attempt, logs.BATCH) for attempt in logs.attempts(run_dir)]
    written = [log for log in batches if log.exists()]
    lines = _end(written[-1]).splitlines() if written else []
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
    text = _end(run_dir / rundir.LOGS / f"slurm-{job_id}.out")
    if match := ENDED_BY_SLURM.search(text[text.rfind("mixlaunch: attempt") :]):
        return WHY_ENDED.get(match[1] or "", "CANCELLED")
    return None


def _end(log: Path) -> str:
    """The end of a log; nothing of one that can't be read."""
    try:
        return shared_files.tail(log, END).decode(errors="replace")
    except OSError:
        return ""


def is_running(run_dir: Path) -> bool:
    """Whether any process of a local run is alive on this machine."""
    return bool(processes.marked(**{MARK: str(run_dir)}))


def find_job(script: Path, host: Host) -> str | None:
    """The id of a job of `script` that isn't in its run's record, if Slurm has one; `Fault` if Slurm doesn't
    answer.
    """
    path, known = str(host.original(script)), _recorded(script, host)
    queue = client.queue(host, timeout=LOOK_TIMEOUT).values()
    found = [job.id for job in queue if job.command == path and job.id.isdecimal() and job.id not in known]
    return max(found, key=int, default=None)


def _recorded(script: Path, host: Host) -> list[str]:
    """The jobs in the record beside `script`, or beside its copy."""
    try:
        return record.read(host.place(script).parent).job_ids
    except UsageError:
        return []


def cancel_slurm(job_ids: Iterable[str], host: Host) -> None:
    """Ask Slurm to end jobs; `Fault` if it refuses."""
    host.call("scancel", *job_ids)


def cancel_local(run_dir: Path, job_id: str) -> None:
    """End a local run: first its script, which lets the ranks end, then the remaining processes by force."""

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
    if code is None and job.exit_code:  # Slurm's own code is less exact: it reports 9 for a script's 137
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
