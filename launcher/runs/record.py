"""Run directories: one folder a run, found again by name, prefix, job id, path or as the newest.

`run.json` is the record; it is replaced whole, never edited, and a newer schema than ours is refused.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import secrets
import shutil
import socket
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.common import words
from launcher.errors import Fault, Interrupted, UncertainError, UsageError
from launcher.host import copies
from launcher.runs import state as states
from launcher.runs.state import SCRIPT, State

if TYPE_CHECKING:
    from launcher.cluster.profile import ClusterProfile
    from launcher.planning.jobs import JobPlan

SCHEMA = 1
RECORD = "run.json"
NEWEST = "newest"
SUBMITTING = "SUBMITTING"
NEVER = "DependencyNeverSatisfied"  # Slurm's reason for a job that waits for one that failed


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory and its record."""

    path: Path
    record: dict[str, Any]

    @property
    def name(self) -> str:
        """The folder's name, which is unique in its place."""
        return self.path.name

    @property
    def job(self) -> str:
        """finetune, convert, ..."""
        return str(self.record["job"])

    @property
    def cluster(self) -> str:
        """Name of the profile."""
        return str(self.record["profile"]["name"])

    @property
    def profile(self) -> "ClusterProfile":
        """The profile as it was when the run was made."""
        from launcher.cluster.profile import ClusterProfile

        return ClusterProfile.model_validate(self.record["profile"])

    @property
    def is_local(self) -> bool:
        """Whether it runs as processes of one machine."""
        return bool(self.record["profile"]["scheduler"] == "local")

    @property
    def created(self) -> str:
        """When, as ISO text with a time zone."""
        return str(self.record["created"])

    @property
    def job_ids(self) -> list[str]:
        """Every job submitted for this run, oldest first."""
        return list(self.record["jobs"])

    @property
    def job_id(self) -> str | None:
        """The newest job; None while its submission isn't known to have ended."""
        return self.job_ids[-1] if self.job_ids else None

    @property
    def submitting(self) -> bool:
        """Whether a submission began of which nobody recorded the end."""
        return bool(self.record.get("submitting", not self.job_ids))

    @property
    def environment(self) -> dict[str, str]:
        """What a Slurm command needs to reach this run's cluster."""
        conf = self.record["profile"].get("slurm_conf")
        login = copies.login_of(self.path)
        return ({"SLURM_CONF": conf} if conf else {}) | (login.variables if login else {})


def new_path(plan: "JobPlan") -> Path:
    """A run directory's path for `plan`, not made yet: name, time, and a suffix so that no two meet."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(plan.profile.paths.runs) / f"{plan.name}-{now}-{secrets.token_hex(2)}"


def start(plan: "JobPlan", *, asked: Sequence[str] = (), path: Path | None = None) -> Run:
    """Render, check, make the run directory, submit, record. Without a job, nothing stays behind."""
    from launcher.cluster import bad_nodes
    from launcher.planning import secrets as secrets_env
    from launcher.planning import uploads
    from launcher.script import lint, render

    secrets_env.require(plan)
    plan = bad_nodes.leave_out(plan)
    path = path or new_path(plan)
    text = render.render(plan, str(path))
    lint.check(text, plan.profile.slurm_version)
    uploads.bring(plan)
    here = copies.place(plan.profile.login_node, path)
    with copies.submitting(here):
        run = create(plan, here, asked=asked)
        return with_job(run, _submitted(plan, text, run))


def _submitted(plan: "JobPlan", text: str, run: Run) -> str:
    """The job of a run directory that has none yet; without one the directory is removed."""
    from launcher.planning import secrets as secrets_env
    from launcher.script import render
    from launcher.submit import sbatch

    (run.path / "config.yaml").write_text(render.config_text(plan))
    try:
        secrets_env.write(plan, run.path)
        return sbatch.submit(plan, text, run.path)
    except Interrupted as interrupted:
        with_job(run, interrupted.job_id)
        raise
    except KeyboardInterrupt:
        _settle(run)
        raise
    except UncertainError:
        raise
    except (Fault, OSError):
        shutil.rmtree(run.path)
        raise


def _settle(run: Run) -> None:
    """After a Ctrl-C around the submission: keep the run if it got a job, remove it if it surely didn't."""
    from launcher.submit import sbatch

    if job_id := job_after_all(run):
        with_job(run, job_id)
        raise sbatch.interrupted(job_id)
    shutil.rmtree(run.path)


def job_after_all(run: Run) -> str | None:
    """After a Ctrl-C around the submission: the job that Slurm has; on this machine whatever began is ended."""
    if run.is_local:
        states.cancel_local(run.path, "")
        return None
    return states.find_job(run.path / SCRIPT, run.environment)


def create(plan: "JobPlan", path: Path, *, asked: Sequence[str] = ()) -> Run:
    """Make the run directory with its record; `Fault` if it can't be made."""
    record = {
        "schema": SCHEMA,
        "name": path.name,
        "job": plan.job,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "asked": list(asked),
        "host": socket.gethostname(),
        "nodes": plan.nodes,
        "tasks_per_node": plan.tasks_per_node,
        "layout": asdict(plan.layout) if plan.layout else None,
        "config": plan.config,
        "outputs": list(plan.outputs),
        "resumable": plan.resumable,
        "secrets": list(plan.secrets),
        "time": plan.time,
        "exclude": list(plan.exclude),
        "pipeline": asdict(plan.link) if plan.link else None,
        "profile": plan.profile.model_dump(mode="json"),
        "versions": {"mixlaunch": importlib.metadata.version("mixlaunch"), "python": platform.python_version()},
        "jobs": [],
        "submitting": True,
        "resubmissions": [],
        "cancelled": False,
    }
    try:
        path.mkdir(parents=True)
        (path / "logs").mkdir()  # Slurm writes its own output there and makes no folders
    except OSError as error:
        raise Fault(f"run directory {path}: {error.strerror}") from error
    run = Run(path=path, record=record)
    _write(run)
    return run


def read(path: Path) -> Run:
    """The run in `path`; `UsageError` if it is none or made by a newer mixlaunch."""
    try:
        record = json.loads((path / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: no run directory (it has no {RECORD})") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / RECORD}: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path / RECORD}: not the record of a run")
    if record.get("schema") != SCHEMA:
        raise UsageError(
            f"{path / RECORD}: schema {record.get('schema')}, this mixlaunch reads {SCHEMA}; update it"
        )
    if not _whole(record):
        raise UsageError(f"{path / RECORD}: not the record of a run")
    return Run(path=path, record=record)


def _whole(record: dict[str, Any]) -> bool:
    """Whether it has what every command looks at."""
    kinds = {"job": str, "created": str, "jobs": list, "host": str, "resumable": bool, "cancelled": bool}
    of_profile = {"name": str, "scheduler": str}
    profile = record.get("profile")
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items()) and (
        isinstance(profile, dict) and all(isinstance(profile.get(key), kind) for key, kind in of_profile.items())
    )


def reread(run: Run) -> Run:
    """`run` with its record as it is now; as it was, where that can't be read."""
    try:
        return read(run.path)
    except UsageError:
        return run


def every(roots: Iterable[Path]) -> list[Run]:
    """All runs below `roots`, newest first; folders that are no runs are passed over."""
    roots = list(roots)
    _pull(roots)
    found = []
    for record in {path.resolve() for root in roots for path in root.glob(f"*/{RECORD}")}:
        try:
            found.append(read(record.parent))
        except UsageError:
            continue
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True)


def _pull(roots: Sequence[Path]) -> None:
    """Bring copies up to date. One login node that doesn't answer is no reason to hide the runs of others."""
    for root in roots:
        try:
            copies.pull(root)
        except Fault as fault:
            if len(roots) == 1:
                raise
            print(f"warning: {fault}\n  its runs are shown as they were", file=sys.stderr)


def find(reference: str, roots: Iterable[Path]) -> Run:
    """The run that `reference` means: a path, a name, a job's id, "newest", or a prefix (its newest run).

    Of a run behind a login node, every log is brought here.
    """
    if "/" in reference:
        return read(Path(os.path.expanduser(reference)).absolute())
    found = _matching(reference, list(roots))
    if copies.login_of(found.path):
        copies.refresh(found.path)
        return reread(found)
    return found


def _matching(reference: str, roots: Sequence[Path]) -> Run:
    runs = every(roots)
    if not runs:
        raise UsageError(f"there are no runs in {', '.join(map(str, roots))}")
    if reference == NEWEST:
        return runs[0]
    for matches in (
        [run for run in runs if run.name == reference],
        [run for run in runs if reference in run.job_ids],
        [run for run in runs if run.name.startswith(reference)],
    ):
        if matches:
            return matches[0]
    near = words.nearest(reference, [run.name for run in runs], most=3, cutoff=0.3)
    raise UsageError(f"no run {reference!r}; nearest: {', '.join(near or [run.name for run in runs[:3]])}")


def state_of(run: Run) -> State:
    """What one run is doing."""
    return states_of([run])[run.path]


def states_of(runs: Sequence[Run]) -> dict[Path, State]:
    """What each run is doing, with one question to each cluster."""
    found: dict[Path, State] = {}
    clusters: dict[tuple[tuple[str, str], ...], dict[Path, str]] = {}
    for run in runs:
        current = _adopted(run) if run.submitting else run
        if current.submitting or current.job_id is None:
            found[run.path] = State(state=SUBMITTING, source="record", reason="its submission didn't end")
        elif run.is_local:
            host, cancelled = str(run.record["host"]), bool(run.record["cancelled"])
            found[run.path] = states.of_local(run.path, host, cancelled=cancelled)
        else:
            clusters.setdefault(tuple(run.environment.items()), {})[run.path] = current.job_id
    for environment, jobs in clusters.items():
        found |= states.of_slurm(jobs, dict(environment))
    return {run.path: _cancelled(run, found[run.path]) for run in runs}


def stuck(found: Sequence[Run]) -> list[Run]:
    """Those that can never start: a job that they wait for failed, or can't start itself."""
    states = states_of(found)
    waiting = [run for run in found if states[run.path].state == "PENDING"]
    never = [run for run in waiting if states[run.path].reason == NEVER]
    while True:
        ids = {run.job_id for run in never}
        behind = [run for run in waiting if run not in never and ids & _waits_for(run)]
        if not behind:
            return never
        never += behind


def _waits_for(run: Run) -> set[str]:
    link = run.record.get("pipeline")
    return set(link["jobs"]) if link else set()


def _cancelled(run: Run, state: State) -> State:
    """A run that we cancelled and Slurm has forgotten was cancelled, whatever its logs say."""
    forgotten = run.record["cancelled"] and state.source == "logs" and not state.active
    return replace(state, state="CANCELLED") if forgotten and state.state != "COMPLETED" else state


def cancel(run: Run) -> bool:
    """End the run's job; False if it has ended already. `Fault` if the scheduler refuses."""
    current = _adopted(run) if run.submitting else run
    if current.submitting or current.job_id is None or not state_of(current).active:
        return False
    if run.is_local and socket.gethostname() != run.record["host"]:
        raise UsageError(f"{run.name} runs on {run.record['host']}; cancel it there")
    if run.is_local:
        changed(current, cancelled=True)
        states.cancel_local(run.path, current.job_id)
    else:
        states.cancel_slurm([current.job_id], run.environment)
        changed(current, cancelled=True)
    return True


def _adopted(run: Run) -> Run:
    """A run whose submission was cut off: its job, if Slurm has one, is found by its script's path."""
    run = reread(run)  # somebody may have found it already
    if run.is_local or not run.submitting:
        return run
    try:
        noted = _noted(run)
        told = noted is not None and noted not in run.job_ids
        job_id = noted if told else states.find_job(run.path / SCRIPT, run.environment)
    except Fault:
        return run
    return with_job(run, job_id) if job_id else run


def _noted(run: Run) -> str | None:
    """The job that a login node's sbatch told of, though we didn't hear it."""
    if (login := copies.login_of(run.path)) is None:
        return None
    from launcher.submit import sbatch_ssh

    return sbatch_ssh.noted(login, copies.original(run.path), len(run.job_ids))


def with_job(run: Run, job_id: str) -> Run:
    """`run` with a job more, whose submission is over; the job's id is told even where it can't be kept."""
    try:
        return changed(run, jobs=[*run.job_ids, job_id], submitting=False)
    except OSError as error:
        path = run.path / RECORD
        raise UncertainError(f"job {job_id} is submitted, but {path} can't say so: {error.strerror}") from error


def changed(run: Run, **values: Any) -> Run:
    """`run` with some of its record replaced, here and where it is a copy from."""
    changed = replace(run, record={**run.record, **values})
    _write(changed)
    with contextlib.suppress(Fault):  # a login node that has gone silent keeps its own notes of the job
        copies.put(run.path / RECORD)
    return changed


def _write(run: Run) -> None:
    temporary = run.path / f".{RECORD}.{os.getpid()}"
    temporary.write_text(json.dumps(run.record, indent=1))
    temporary.replace(run.path / RECORD)
