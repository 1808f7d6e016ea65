"""A run directory's record: what was asked, as which jobs, with which profile.

`run.json` is replaced whole, never edited, and a newer schema than ours is refused.
"""

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launcher.cluster.profile import ClusterProfile
from launcher.common import files
from launcher.errors import Fault, UncertainError, UsageError
from launcher.host import login_node
from launcher.host.base import Host
from megatron_mixtral.spec import rundir

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run directory and its record."""

    path: Path
    record: dict[str, Any]

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
        return login_node.of(self.path, self.record["profile"].get("slurm_conf"))


def read(path: Path) -> Run:
    """The run in `path`; `UsageError` if it isn't a run, or a newer mixlaunch made it."""
    try:
        record = json.loads((path / rundir.RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{path}: no run directory (it has no {rundir.RECORD})") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path / rundir.RECORD}: {error}") from error
    if not isinstance(record, dict):
        raise UsageError(f"{path / rundir.RECORD}: not the record of a run")
    if record.get("schema") != SCHEMA:
        raise UsageError(
            f"{path / rundir.RECORD}: schema {record.get('schema')}, this mixlaunch reads {SCHEMA}; update it"
        )
    if not _whole(record):
        raise UsageError(f"{path / rundir.RECORD}: not the record of a run")
    return Run(path=path, record=record)


def _whole(record: dict[str, Any]) -> bool:
    """Whether the record has the keys that every command needs."""
    kinds = {"job": str, "created": str, "jobs": list, "host": str, "resumable": bool, "cancelled": bool}
    of_profile = {"name": str, "scheduler": str}
    profile = record.get("profile")
    return all(isinstance(record.get(key), kind) for key, kind in kinds.items()) and (
        isinstance(profile, dict) and all(isinstance(profile.get(key), kind) for key, kind in of_profile.items())
    )


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
