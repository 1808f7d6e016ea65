"""Brings text files from this machine to a cluster behind a login node.

A file's place is in the data folder, under this machine's name and its own path. So a second upload sends only
changes.
"""

import os.path
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile
from launcher.errors import UsageError
from launcher.planning.plan import JobPlan

WHOLE = ("output", "data")  # options that are paths and nothing else


def redirect(profile: ClusterProfile, files: Sequence[str]) -> tuple[str, ...]:
    """`files` as the job will see them; files of this machine get the path that they are brought to."""
    if profile.host.is_here:
        return tuple(files)
    return tuple(_destination(profile, file) for file in files)


def require_whole_paths(profile: ClusterProfile, given: dict[str, Any]) -> None:
    """`UsageError` for a path that is relative to a folder of this machine."""
    if profile.host.is_here:
        return
    for name in ("model", *WHOLE):
        values = given.get(name) or ()
        for value in (values,) if isinstance(values, str) else values:
            if value.startswith((".", "~")) or (name in WHOLE and not value.startswith("/")):
                raise UsageError(
                    f"--{name}: {value!r} is relative to this machine; give an absolute path of {profile.host.name}"
                )


def source(profile: ClusterProfile, path: str) -> Path | None:
    """The file of this machine that is brought to `path`."""
    root = _root(profile)
    brought = path.startswith(f"{root}/") and not profile.host.is_here
    return Path(path.removeprefix(root)) if brought else None


def bring(plan: JobPlan) -> None:
    """Copy the files of this machine that `plan` reads; unchanged files cost one comparison."""
    sources = ((source(plan.profile, given.path), given.path) for given in plan.inputs)
    plan.profile.host.bring([(file, there) for file, there in sources if file])


def _destination(profile: ClusterProfile, file: str) -> str:
    here = paths.path(file, "FILES")
    return f"{_root(profile)}{here}" if os.path.exists(here) else here


def _root(profile: ClusterProfile) -> str:
    return f"{profile.paths.data}/uploads/{socket.gethostname()}"
