"""Runs are found by name, prefix, job id, path or as the newest one, in the folders where they may lie."""

import contextlib
import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.cluster import catalog, profile
from launcher.common import printable, words
from launcher.errors import Fault, MixlaunchError, UsageError
from launcher.host import login_node
from launcher.runs import record
from launcher.runs.record import Run
from megatron_mixtral.spec import rundir

NEWEST = "newest"


def roots_of(cluster: str | None) -> list[Path]:
    """Where runs may lie: one cluster's folder, or every profile's.

    Of clusters behind login nodes only the default one is asked unless runs there are known here already.
    """
    if cluster is not None:
        return [profile.load(cluster).runs_here]
    roots = [profile.load().runs_here]
    for path in catalog.available().values():
        try:
            found = profile.read(path)
        except MixlaunchError:
            continue  # `clusters` shows what is wrong with it
        if found.host.has_copies:
            roots.append(found.runs_here)
    return list(dict.fromkeys(roots))


@dataclass(frozen=True, kw_only=True)
class Broken:
    """A folder that says it is a run and can't be read as one."""

    path: Path
    why: str


def every(roots: Iterable[Path]) -> list[Run]:
    """All runs below `roots`, newest first; folders that are no runs are passed over."""
    return look(roots)[0]


def look(roots: Iterable[Path]) -> tuple[list[Run], list[Broken]]:
    """The same, and what is broken."""
    roots = list(roots)
    _pull(roots)
    found: list[Run] = []
    broken: list[Broken] = []
    folders = {match.parent for root in roots for match in root.resolve().glob(f"*/{rundir.RECORD}")}
    for path in {_target(folder): None for folder in folders}:
        try:
            found.append(record.read(path))
        except UsageError as error:
            broken.append(Broken(path=path, why=str(error).removeprefix(f"{path / rundir.RECORD}: ")))
    found.sort(key=lambda run: (datetime.datetime.fromisoformat(run.created).astimezone(), run.name), reverse=True)
    return found, sorted(broken, key=lambda one: one.path.name)


def _target(folder: Path) -> Path:
    """Where a link leads that this user made; anybody else's stays what it is, and leads nowhere."""
    with contextlib.suppress(OSError):
        if folder.is_symlink() and folder.lstat().st_uid == os.geteuid():
            return folder.resolve()
    return folder


def _pull(roots: Sequence[Path]) -> None:
    """Update the copies. If one login node doesn't answer, the runs of the others are still shown."""
    for root in roots:
        try:
            login_node.of(root).pull(root)
        except Fault as fault:
            if len(roots) == 1:
                raise
            printable.out(f"warning: {fault}\n  its runs are shown as they last were", err=True)


def run(reference: str, roots: Iterable[Path], *, others: bool = False) -> Run:
    """The run that `reference` means: a path, a name, a job's id, "newest", or a prefix (its newest run).

    It is a run of one's own, or with `others` anybody's of that full name. Of a run behind a login node, every log
    is brought here.
    """
    if "/" in reference:
        return _allowed(record.read(Path(os.path.expanduser(reference)).absolute()), others)
    found = _allowed(_matching(reference, list(roots)), others)
    found.host.refresh(found.path)
    return _allowed(record.reread(found), others)


def _allowed(run: Run, others: bool) -> Run:
    if not others:
        record.require_own(run)
    return run


def _matching(reference: str, roots: Sequence[Path]) -> Run:
    runs, broken = look(roots)
    mine = [run for run in runs if not run.stranger]
    if reference == NEWEST and mine:
        return mine[0]
    for matches in (
        [run for run in mine if run.name == reference],
        [run for run in runs if run.name == reference],
        [run for run in mine if reference in run.job_ids],
        [run for run in mine if run.name.startswith(reference)],
    ):
        if matches:
            return matches[0]
    why = "".join(f"\n  {reference}: {one.why}" for one in broken if one.path.name == reference)
    if not mine:
        raise UsageError(f"there are no runs in {', '.join(map(str, roots))}{' of yours' if runs else ''}{why}")
    near = words.nearest(reference, [run.name for run in mine], most=3, cutoff=0.3)
    raise UsageError(f"no run {reference!r}; nearest: {', '.join(near or [run.name for run in mine[:3]])}{why}")
