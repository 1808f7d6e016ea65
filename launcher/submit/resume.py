"""Continues a run: a new job in the same run directory, with the same script, as its next attempt.

As every submission it returns an id, or an error that says whether there is a job. Two commands at once make one
job. Only the time limit and the excluded nodes can change, not the number of ranks.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launcher.cluster import bad_nodes
from launcher.cluster.profile import time_limit
from launcher.common import files, quoting, shared_files
from launcher.errors import Fault, Interrupted, UncertainError, UsageError
from launcher.planning import requeue
from launcher.planning.layout import Placement
from launcher.planning.plan import JobPlan
from launcher.runs import record, states
from launcher.runs.record import Run
from launcher.script import lint
from launcher.slurm import hostlist
from launcher.submit import answer, start
from megatron_mixtral.spec.rundir import RECORD, SCRIPT


def resume(run: Run, *, time: str | None = None, exclude: Sequence[str] = ()) -> Run:
    """Continue a run that ended before it was done; `UsageError` if it can't be continued."""
    if not run.record["resumable"]:
        raise UsageError(
            f"{run.name}: {run.job} saves nothing to resume from; `mixlaunch retry {run.name}` starts it again"
        )
    return _again(run, "resume", time=time, exclude=exclude)


def retry(run: Run, *, time: str | None = None, exclude: Sequence[str] = ()) -> Run:
    """Run a failed run again, from its newest checkpoint if it has one; `UsageError` if it didn't fail."""
    return _again(run, "retry", time=time, exclude=exclude)


def _again(run: Run, how: str, *, time: str | None, exclude: Sequence[str]) -> Run:
    record.require_own(run)
    with _alone(run):
        if not os.access(run.path / RECORD, os.W_OK):
            raise UsageError(f"{run.name}: you can't write its run directory; only its owner can continue it")
        run = record.read(run.path)
        record.require_own(run)
        _require_ended(run, how)
        limit = _limit(run, time)
        explicit = sorted({*run.record.get("exclude", []), *exclude})
        text = _script(run, limit if time else None, explicit)
        lint.check(text, run.profile.slurm_version)
        told = {"how": how, "at": _now(), "exclude": explicit, "time": limit}
        history = [*run.record.get("resubmissions", []), told]
        changes = {"exclude": explicit, "time": limit, "resubmissions": history, "cancelled": False}
        _submit(record.changed(run, submitting=True, **changes), run, text, limit)
        return record.read(run.path)


def _submit(changed: Run, before: Run, text: str, limit: str) -> None:
    """Make the job and record it; if there is no job, script and record stay as they were."""

    script = changed.path / SCRIPT
    old, counts = shared_files.read_mine(script).decode(), _reset(changed.path)
    try:
        job_id = start.submit(_plan(changed, limit), text, changed.path)
    except Interrupted as interrupted:
        record.with_job(changed, interrupted.job_id)
        raise
    except UncertainError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and (made := start.job_after_all(changed)):
            record.with_job(changed, made)
            raise answer.interrupted(made) from None
        files.write(script, old)
        for path, text in counts.items():
            path.write_text(text)
        record.changed(before)
        raise
    record.with_job(changed, job_id)


def _reset(path: Path) -> dict[Path, str]:
    """Reset the script's counters; returns their old values."""
    counts = {path / name: (path / name).read_text() for name in requeue.COUNTS if (path / name).exists()}
    for count in counts:
        count.write_text(requeue.COUNTS[count.name])
    return counts


def _require_ended(run: Run, how: str) -> None:
    state = states.of_run(run)
    run = record.read(run.path)
    if state.state == states.SUBMITTING and run.submitting and not run.is_local:
        states.find_job(run.path / SCRIPT, run.host)  # raises if Slurm doesn't answer, because there may be a job
        return
    if state.state == states.UNKNOWN:
        raise Fault(f"{run.name}: whether it has ended isn't known: {state.reason}")
    if state.active:
        job = f" as job {run.job_id}" if run.job_id else ""
        raise UsageError(f"{run.name} is {state.state}{job}; `mixlaunch cancel {run.name}` ends it first")
    if state.state == "COMPLETED":
        raise UsageError(f"{run.name} is done; there is nothing to {how}")
    if how == "retry" and state.state == "CANCELLED" and run.record["resumable"]:
        raise UsageError(f"{run.name} was cancelled, it didn't fail; `mixlaunch resume {run.name}` continues it")


def _limit(run: Run, time: str | None) -> str:
    """The time limit: the one asked for, else what the script says, else the record."""

    if time is None:
        match = re.search(r'^#SBATCH --time="?([^"\s]+)"?$', _text(run), re.M)
        return match[1] if match else str(run.record.get("time") or run.profile.time)
    try:
        return time_limit(time)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from None


def _script(run: Run, limit: str | None, explicit: Iterable[str]) -> str:
    """The run's script with another limit and other nodes to leave out."""
    text = _text(run)
    if run.is_local:
        if explicit:
            raise UsageError("--exclude: this run is on this machine only; there are no nodes to exclude")
        return text
    profile = run.profile
    listed = [entry.node for entry in bad_nodes.read(profile)]
    nodes = {*profile.excluded, *explicit, *listed}
    text = _with_option(text, "exclude", hostlist.compress(nodes) or None)
    return _with_option(text, "time", limit) if limit else text


def _text(run: Run) -> str:
    """The run's script, which nobody else can have written."""
    try:
        return shared_files.read_mine(run.path / SCRIPT).decode()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"{run.path / SCRIPT}: {why}; there is nothing to submit again") from error


def _with_option(text: str, option: str, value: str | None) -> str:
    """`text` with one #SBATCH option set in the place it had, else as the last one, or without it."""
    lines = text.splitlines(keepends=True)
    places = [place for place, line in enumerate(lines) if line.startswith("#SBATCH --")]
    mine = [place for place in places if lines[place].startswith(f"#SBATCH --{option}=")]
    at = mine[0] if mine else places[-1] + 1
    new = [f"#SBATCH --{option}={quoting.directive(value)}\n"] if value else []
    return "".join([*lines[:at], *new, *lines[at + len(mine) :]])


def _plan(run: Run, limit: str) -> JobPlan:
    """The part of the run's plan that a submission needs."""

    placement = Placement(nodes=run.record["nodes"], tasks_per_node=run.record["tasks_per_node"])
    return JobPlan(
        job=run.job,
        name=run.name,
        profile=run.profile,
        placement=placement,
        config=run.record["config"],
        time=limit,
    )


@contextlib.contextmanager
def _alone(run: Run) -> Iterator[None]:
    """One command at a time goes on with a run; on a file system without locks the check of its state must do."""
    with run.host.submitting(run.path), files.locked(run.path, wait=False) as alone:
        if alone is False:
            raise UsageError(f"{run.name}: another command is continuing it at this moment")
        yield


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")
