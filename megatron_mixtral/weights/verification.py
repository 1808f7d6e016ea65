"""Compares every tensor of a converted folder with its recorded digest.

Digests have the hub's tensor names in every layout, so the same digests prove both directions of a conversion.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import hub, legacy
from megatron_mixtral.weights.copying import BLOCK, RowRun, Source, around, read_rows
from megatron_mixtral.weights.plan import hub_runs
from megatron_mixtral.weights.shared_work import Workers
from megatron_mixtral.weights.tensors import Rows, hub_shapes


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's share of the tensors, with the rows of each and its recorded digest."""

    source: Source
    runs: dict[str, list[RowRun]]
    recorded: dict[str, str]
    bytes: int

    def check(self, progress: Callable[[int], Any] = int) -> None:
        """Read and compare them; `CheckpointError` names a file and a tensor that has changed."""
        wrong = [
            name for name in self.runs if digest(self.source, self.runs[name], progress) != self.recorded[name]
        ]
        if wrong:
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            file = self.source.file_of(self.runs[wrong[0]][0].rows)
            raise CheckpointError(
                f"{file}: tensor {wrong[0]}{more}: not what was converted; the files have changed"
            )


def share(folder: Path, marker: dict[str, Any], workers: Workers) -> Share:
    """This process's share, with as many bytes as any other's; `CheckpointError` for a missing tensor or shape."""
    recorded = marker["digests"]
    if marker.get("kind") != "peft":  # this kind has no config.json
        _check_shape(folder, marker.get("shape", {}))
    source, runs = tensors_of(folder, marker)
    if missing := sorted(recorded.keys() - runs.keys()):
        raise CheckpointError(f"{folder}: tensor {missing[0]} has a digest and is missing")
    names = sorted(recorded)
    sizes = [sum(len(run.rows) * source.row_bytes(run.rows.name) for run in runs[name]) for name in names]
    places = workers.mine(sizes)
    mine = {names[place]: runs[names[place]] for place in places}
    return Share(source=source, runs=mine, recorded=recorded, bytes=sum(sizes[place] for place in places))


def check_others(folder: Path, marker: dict[str, Any]) -> None:
    """`CheckpointError` names a file without tensors that is missing or has changed."""
    for name, before in marker.get("others", {}).items():
        _check_around(folder / name, before, (), "not what was written at the conversion")


def check_around(folder: Path, marker: dict[str, Any], source: Any) -> None:
    """`CheckpointError` names a file that has changed around its tensors; some readers couldn't read it."""
    spans = source.spans()
    for name, before in marker.get("around", {}).items():
        _check_around(folder / name, before, spans.get(folder / name, ()), "damaged around its tensors")


def _check_around(path: Path, before: str, spans: Iterable[tuple[int, int]], wrong: str) -> None:
    try:
        now = around(path, spans)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}; it was there at the conversion") from error
    if now != before:
        raise CheckpointError(f"{path}: {wrong}")


def check_latest(path: Path, name: str) -> None:
    """`CheckpointError` unless upstream's Megatron finds the folder by this file."""
    if not path.is_file() or path.read_bytes() != name.encode():
        raise CheckpointError(f"{path}: should contain {name}, by which Megatron finds the folder")


def _check_shape(folder: Path, recorded: dict[str, Any]) -> None:
    """`config.json` has no digest, so compare its sizes with those that the conversion read."""
    for name, now in asdict(MixtralShape.from_folder(folder)).items():
        if (before := recorded.get(name, now)) != now:
            raise CheckpointError(f"{folder / 'config.json'}: {name} is {now}, and was {before} at the conversion")


def tensors_of(folder: Path, marker: dict[str, Any]) -> tuple[Source, dict[str, list[RowRun]]]:
    """The folder's source, and for each hub tensor (in legacy files, each rank's tensor) its rows."""
    if (kind := marker.get("kind")) == "peft":
        stored = hub.HubFolder(folder)
    else:
        shape = MixtralShape.from_folder(folder)
        if kind == "hub":
            stored = hub.HubFolder(folder)
            stored.check(hub_shapes(shape))
        else:
            cut = legacy.open_weights(folder, shape, marker)
            if not isinstance(cut, legacy.LegacyFolder):
                return cut, hub_runs(shape)
            stored = hub.HubFolder(folder, cut.parameters)  # parts of the hub's tensors
    whole = {name: Rows(name, (), 0, found.shape[0]) for name, found in stored.tensors.items()}
    return stored, {name: [RowRun(rows, name)] for name, rows in whole.items()}


def digest(source: Source, runs: list[RowRun], progress: Callable[[int], Any]) -> str:
    """BLAKE3 of a hub tensor, assembled from its rows."""
    found = blake3()
    for run in runs:
        for part in run.rows.cut(BLOCK // source.row_bytes(run.rows.name)):
            data = read_rows(source, part)
            found.update(data)
            progress(len(data))
    return found.hexdigest()
