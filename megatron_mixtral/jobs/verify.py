"""The job `verify`: compares every tensor of a converted folder with its recorded digest."""

from pathlib import Path

from megatron_mixtral.errors import InputError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.observability.progress import CopyProgress
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import VerifyConfig
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import verification
from megatron_mixtral.weights.shared_work import Workers


def run(config: VerifyConfig, run_dir: Path) -> None:
    """Check this process's share of the tensors; `CheckpointError` names those that differ."""
    workers = Workers.from_environment()
    given = Path(config.folder).expanduser().absolute()
    folder = weights_folder.resolve(given)
    marker = weights_folder.read_marker(folder)
    if not marker.get("digests"):
        raise InputError(f"{folder}: records no digests; convert writes them, training doesn't")
    if workers.rank == 0:
        verification.check_others(folder, marker)
        if folder.parent == given:
            verification.check_latest(given / rundir.LATEST, folder.name)
    mine = verification.share(folder, marker, workers)
    if workers.rank == 0:
        verification.check_around(folder, marker, mine.source)
    events = EventLog(run_dir / rundir.EVENTS if workers.rank == 0 else None)
    progress = CopyProgress(mine.bytes, label=f"rank {workers.rank}", events=events)
    mine.check(progress.add)
    progress.finish()
    verdict = f"{folder}: {len(mine.runs)} tensors are as they were converted"
    print(verdict, flush=True)
    events.write("note", text=verdict if workers.size == 1 else f"rank 0: {verdict}")
