"""A run directory's record: what was asked, as which jobs, with which profile.

`run.json` is replaced whole, never edited, and a newer schema than ours is refused. A record that somebody else can
have written is theirs: it is shown, and decides nothing.
"""

import contextlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.cluster.profile import ClusterProfile
from launcher.common import files, schema, shared_files
from launcher.errors import Fault, UncertainError, UsageError
from launcher.host import login_node
from launcher.host.base import Host
from megatron_mixtral.spec import rundir

SCHEMA = 1
LARGEST = 4 << 20  # bytes
REQUIRED = {
    "job": schema.text,
    "created": schema.moment,
    "jobs": schema.each(schema.matching(r"[0-9]{1,18}(?:[_+.][0-9]{1,18})?"), most=10_000),
    "host": schema.text,
    "resumable": schema.flag,
    "cancelled": schema.flag,
    "profile": schema.fields(
        {"name": schema.text, "scheduler": schema.text}, {"slurm_conf": schema.maybe(schema.text)}
    ),
}
LINK = {
    "step": schema.whole,
    "steps": schema.whole,
    "after": schema.each(schema.text),
    "jobs": schema.each(schema.text),
}
OPTIONAL = {
    "nodes": schema.count,
    "tasks_per_node": schema.count,
    "submitting": schema.flag,
    "pipeline": schema.maybe(schema.fields(LINK)),
    "exclude": schema.each(schema.text),
    "time": schema.maybe(schema.text),
    "resubmissions": schema.each(schema.object_),
    "config": schema.object_,
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory and its record."""

    path: Path
    record: dict[str, Any]
    stranger: str = ""  # who else can have written it, such as "alice's"; empty for a run of one's own

    @property
    def name(self) -> str:
        """The folder's name, which is unique in its parent folder."""
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
    def profile(self) -> ClusterProfile:
        """The profile as it was when the run was made."""
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
        """The newest job; None until its submission is known to have finished."""
        return self.job_ids[-1] if self.job_ids else None

    @property
    def submitting(self) -> bool:
        """Whether a submission began and its end wasn't recorded."""
        return bool(self.record.get("submitting", not self.job_ids))

    @property
    def host(self) -> Host:
        """Where its cluster's commands run: this machine, or the login node that it is a copy from."""
        conf = None if self.stranger else self.record["profile"].get("slurm_conf")  # it names code that Slurm loads
        return login_node.of(self.path, conf)


def read(path: Path) -> Run:
    """The run in `path`; `UsageError` if it isn't a run, or a newer mixlaunch made it."""
    try:
        data, stranger = _read(path)
        record = shared_files.parsed(data)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: not a run directory (it has no {rundir.RECORD})") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / rundir.RECORD}: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path / rundir.RECORD}: not the record of a run")
    if record.get("schema") != SCHEMA:
        raise UsageError(
            f"{path / rundir.RECORD}: schema {record.get('schema')}, this mixlaunch reads {SCHEMA}; update it"
        )
    if wrong := schema.misfit(record, REQUIRED, OPTIONAL):
        raise UsageError(f"{path / rundir.RECORD}: not the record of a run: {wrong}")
    return Run(path=path, record=record, stranger=stranger)


def _read(path: Path) -> tuple[bytes, str]:
    """The record, and who else can have written it: asked of the very folder and file that are read."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        data, found = shared_files.read_with_owner(rundir.RECORD, most=LARGEST, dir_fd=folder)
        stranger = shared_files.stranger(os.fstat(folder)) or shared_files.stranger(found)
    finally:
        os.close(folder)
    return data, login_node.of(path).stranger(path) or stranger


def require_own(run: Run) -> None:
    """`UsageError` for a run that somebody else can have written."""
    if not run.stranger:
        return
    hint = "only its owner may do that"
    if run.stranger.startswith("writable"):
        hint = f"look through it, and `chmod -R go-w {run.path}` makes it yours alone"
    raise UsageError(f"{run.name} is {run.stranger}; {hint}")


def reread(run: Run) -> Run:
    """`run` with its current record; unchanged if the record can't be read."""
    try:
        return read(run.path)
    except UsageError:
        return run


def with_job(run: Run, job_id: str) -> Run:
    """`run` with one more job; if the id can't be stored, the error still names it."""
    try:
        return changed(run, jobs=[*run.job_ids, job_id], submitting=False)
    except OSError as error:
        path = run.path / rundir.RECORD
        raise UncertainError(f"job {job_id} is submitted, but {path} can't be written: {error.strerror}") from error


def changed(run: Run, **values: Any) -> Run:
    """`run` with changed keys in its record, here and in the original of a copy."""
    changed = replace(run, record={**run.record, **values})
    write(changed)
    with contextlib.suppress(Fault):  # if the login node doesn't answer, it still has sbatch's stored answer
        run.host.put(run.path / rundir.RECORD)
    return changed


def write(run: Run) -> None:
    """Make the record of `run` what it says."""
    files.write_json(run.path / rundir.RECORD, run.record)
