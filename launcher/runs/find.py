"""Runs are found by name, prefix, job id, path or as the newest one, in the folders where they may lie."""

import os
from collections.abc import Iterable, Sequence
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


def every(roots: Iterable[Path]) -> list[Run]:
    """All runs below `roots`, newest first; other folders are skipped."""
    roots = list(roots)
    _pull(roots)
    found = []
    for path in {path.resolve() for root in roots for path in root.glob(f"*/{rundir.RECORD}")}:
        try:
            found.append(record.read(path.parent))
        except UsageError:
            continue
    return sorted(found, key=lambda run: (run.created, run.name), reverse=True)


def _pull(roots: Sequence[Path]) -> None:
    """Update the copies. If one login node doesn't answer, the runs of the others are still shown."""
    for root in roots:
        try:
            login_node.of(root).pull(root)
        except Fault as fault:
            if len(roots) == 1:
                raise
            printable.out(f"warning: {fault}\n  its runs are shown as they last were", err=True)


def run(reference: str, roots: Iterable[Path]) -> Run:
    """The run that `reference` means: a path, a name, a job's id, "newest", or a prefix (its newest run).

    All logs of a run behind a login node are copied here.
    """
    if "/" in reference:
        return record.read(Path(os.path.expanduser(reference)).absolute())
    found = _matching(reference, list(roots))
    found.host.refresh(found.path)
    return record.reread(found)


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
