"""The job `verify`: whether every tensor of a converted folder still has the digest it had as it was written.

Digests go by the hub's tensor names whatever the layout, so the same numbers prove both directions of a conversion.
"""

from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_mixtral import hub, legacy, weights_folder
from megatron_mixtral.config import MixtralShape, VerifyConfig
from megatron_mixtral.conversion import hub_runs
from megatron_mixtral.copying import BLOCK, Run, Source, read_rows
from megatron_mixtral.errors import CheckpointError, InputError
from megatron_mixtral.events import EventLog
from megatron_mixtral.progress import Progress
from megatron_mixtral.weights import Rows, hub_shapes
from megatron_mixtral.work import Crew


def run(config: VerifyConfig, run_dir: Path) -> None:
    """Check this process's share of the tensors; `CheckpointError` names those that differ."""
    crew = Crew.from_environment()
    folder = weights_folder.resolve(Path(config.folder).expanduser().absolute())
    marker = weights_folder.read_marker(folder)
    recorded = marker.get("digests")
    if not recorded:
        raise InputError(f"{folder}: records no digests; convert writes them, training doesn't")
    source, runs = tensors_of(folder, marker)
    if missing := sorted(recorded.keys() - runs.keys()):
        raise CheckpointError(f"{folder}: tensor {missing[0]} has a digest and is missing")
    names = sorted(recorded)
    sizes = [sum(len(run.rows) * source.row_bytes(run.rows.name) for run in runs[name]) for name in names]
    mine = [names[place] for place in crew.mine(sizes)]
    events = EventLog(run_dir / "events.jsonl" if crew.rank == 0 else None)
    total = sum(size for name, size in zip(names, sizes, strict=True) if name in mine)
    progress = Progress(total, label=f"rank {crew.rank}", events=events)
    wrong = [name for name in mine if digest(source, runs[name], progress) != recorded[name]]
    progress.finish()
    verdict = f"{folder}: {len(mine)} tensors as they were converted"
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise CheckpointError(f"{folder}: tensor {wrong[0]}{more}: not what was converted; the files have changed")
    print(verdict, flush=True)
    events.write("note", text=verdict if crew.size == 1 else f"rank 0: {verdict}")


def tensors_of(folder: Path, marker: dict[str, Any]) -> tuple[Source, dict[str, list[Run]]]:
    """What the folder holds, and for each hub tensor, or rank's own in legacy files, the rows that make it up."""
    shape = MixtralShape.from_folder(folder)
    if marker.get("kind") == "hub":
        stored = hub.HubFolder(folder)
        stored.check(hub_shapes(shape))
    else:
        cut = legacy.open_weights(folder, shape, marker)
        if not isinstance(cut, legacy.LegacyFolder):
            return cut, hub_runs(shape)
        stored = hub.HubFolder(folder, cut.parameters)  # parts of the hub's tensors
    return stored, {name: [Run(Rows(name, (), 0, found.shape[0]), name)] for name, found in stored.tensors.items()}


def digest(source: Source, runs: list[Run], progress: Progress) -> str:
    """BLAKE3 of a hub tensor put together from its rows."""
    found = blake3()
    for run in runs:
        rows, width = run.rows, source.row_bytes(run.rows.name)
        step = max(1, BLOCK // width)
        for start in range(rows.start, rows.stop, step):
            part = Rows(rows.name, rows.index, start, min(start + step, rows.stop))
            data = read_rows(source, part)
            found.update(data)
            progress.add(len(data))
    return found.hexdigest()
