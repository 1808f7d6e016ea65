"""Weights with merged adapters, read by rows like any weights: W + alpha/rank * B A in fp32, then cast.

So every reader of rows (export, the server, a comparison of logits) can read a run of adapters like a model.
Nothing is merged in advance or held as a whole.
"""

import copy
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import legacy
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights.copying import WeightsFolder, read_rows
from megatron_mixtral.weights.hub import HubRows
from megatron_mixtral.weights.lora import Lora, Pair
from megatron_mixtral.weights.tensors import ITEMSIZE, Rows
from megatron_mixtral.weights.torch_dist import TorchDistFolder

if TYPE_CHECKING:
    from torch import Tensor

KEPT = 8  # planes of lora_A in fp32 that are cached for the next rows


class Adapters:
    """The tensors of an adapter checkpoint, each plane as fp32."""

    def __init__(self, folder: Path, shape: MixtralShape, lora: Lora) -> None:
        self.source = TorchDistFolder(folder)
        self.source.check(adapters.shapes(shape, lora))
        self.rank = lora.rank
        self._kept: OrderedDict[tuple[str, tuple[int, ...]], Tensor] = OrderedDict()

    def lora_a(self, pair: Pair, index: tuple[int, ...]) -> "Tensor":
        """[rank, in]"""
        place = pair.name, index
        if place not in self._kept:
            self._kept[place] = self.read(Rows(pair.side("lora_A"), index, 0, self.rank))
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return self._kept[place]

    def lora_b(self, pair: Pair, index: tuple[int, ...], start: int, stop: int) -> "Tensor":
        """Rows start:stop of it, [., rank]"""
        return self.read(Rows(pair.side("lora_B"), index, start, stop))

    def read(self, rows: Rows) -> "Tensor":
        """In fp32."""
        import torch

        data = read_rows(self.source, rows)
        stored = torch.frombuffer(data, dtype=getattr(torch, self.source.dtype(rows.name)))
        return stored.view(len(rows), -1).float()

    def apart(self) -> "Adapters":
        """A copy for another thread, with its own files and memory."""
        mine = copy.copy(self)
        mine.source, mine._kept = self.source.apart(), OrderedDict()
        return mine


class Merged:
    """The base's rows with their adapters added; adapted rows are fp32, and are cast once."""

    def __init__(self, base: WeightsFolder, added: Adapters, shape: MixtralShape, lora: Lora) -> None:
        self.base, self.added, self.scale = base, added, lora.scale
        self._spans = adapters.spans(shape, lora)

    def dtype(self, name: str) -> str:
        return "float32" if name in self._spans else self.base.dtype(name)

    def row_bytes(self, name: str) -> int:
        return self.base.row_bytes(name) // ITEMSIZE[self.base.dtype(name)] * ITEMSIZE[self.dtype(name)]

    def read(self, rows: Rows, out: memoryview) -> None:
        if rows.name not in self._spans:
            return self.base.read(rows, out)
        import torch

        stored = torch.frombuffer(read_rows(self.base, rows), dtype=getattr(torch, self.base.dtype(rows.name)))
        merged = torch.frombuffer(out, dtype=torch.float32)
        merged.copy_(stored)
        self._add(rows, merged.view(len(rows), -1))
        return None

    def file_of(self, rows: Rows) -> Path:
        return self.base.file_of(rows)

    def _add(self, rows: Rows, merged: "Tensor") -> None:
        for span in self._spans[rows.name]:
            start, stop = max(rows.start, span.start), min(rows.stop, span.stop)
            if start < stop:
                first = span.first + start - span.start
                b = self.added.lora_b(span.pair, rows.index, first, first + stop - start)
                merged[start - rows.start : stop - rows.start] += self.scale * (
                    b @ self.added.lora_a(span.pair, rows.index)
                )

    def fingerprint(self) -> dict[str, Any]:
        """Of both folders."""
        return {"base": self.base.fingerprint(), "adapters": self.added.source.fingerprint()}

    def apart(self) -> "Merged":
        """A copy for another thread, with its own files."""
        mine = copy.copy(self)
        mine.base, mine.added = self.base.apart(), self.added.apart()
        return mine


def open_weights(folder: Path, shape: MixtralShape, *, base: str | None = None) -> WeightsFolder:
    """The rows of a complete weights folder of any kind, or of the hub's; `base` as in `find_base`."""
    if weights_folder.is_hub(folder):
        return HubRows(folder, shape)
    marker = weights_folder.read_marker(folder)
    if marker.get("kind") != adapters.KIND:
        return legacy.open_weights(folder, shape, marker)
    lora = adapters.described(marker, folder)
    added = Adapters(folder, shape, lora)
    return Merged(open_base(folder, marker, shape, base=base), added, shape, lora)


def is_adapter(folder: Path) -> bool:
    """Whether a complete folder holds only adapters."""
    return not weights_folder.is_hub(folder) and weights_folder.read_marker(folder).get("kind") == adapters.KIND


def describe_base(folder: Path, shape: MixtralShape) -> dict[str, Any]:
    """An adapter checkpoint's description of its base weights."""
    marker = weights_folder.read_marker(folder)
    if marker.get("kind") == adapters.KIND:
        raise CheckpointError(
            f"{folder}: holds adapters, and adapters on top of adapters aren't supported; "
            "merge them first: convert --to hf, then convert that"
        )
    source = marker.get("source") or {}
    return {
        "path": str(folder.absolute()),
        "identity": adapters.identity(open_weights(folder, shape), shape),
        "digests": _together(marker),
        "hub": source.get("path"),
    }


def _together(marker: dict[str, Any]) -> str | None:
    """One digest of all digests in a converted folder; the same for every layout."""
    if not (digests := marker.get("digests")):
        return None
    from blake3 import blake3

    return blake3(repr(sorted(digests.items())).encode()).hexdigest()


def find_base(folder: Path, marker: dict[str, Any], *, base: str | None = None) -> Path:
    """The base of the adapters in `folder`: `base`, else its path when they were trained."""
    recorded = (marker.get("base") or {}).get("path")
    if not (path := base or recorded):
        raise CheckpointError(f"{folder}: its mixlaunch.json doesn't say which weights its adapters belong to")
    try:
        return weights_folder.find(Path(path).expanduser())
    except CheckpointError as error:
        hint = "" if base else "; --base DIR says where these weights are now"
        raise CheckpointError(f"{folder}: adapters of {recorded}: {error}{hint}") from error


def open_base(
    folder: Path, marker: dict[str, Any], shape: MixtralShape, *, base: str | None = None
) -> WeightsFolder:
    """The rows of the base of the adapters in `folder`; `CheckpointError` if the base has changed."""
    found = find_base(folder, marker, base=base)
    own = MixtralShape.from_folder(found)
    if own != shape:
        raise CheckpointError(f"{found}: isn't the base of the adapters in {folder}: its config.json differs")
    check_base(folder, marker, found, shape)
    return open_weights(found, shape)


def base_of_run(folder: Path, lora: Lora, model: Path, shape: MixtralShape) -> dict[str, Any]:
    """The present place of the base of a run's own checkpoint: its old path, or else `model`."""
    marker = weights_folder.read_marker(folder)
    adapters.check_same(folder, marker, lora)
    try:
        found = find_base(folder, marker)
    except CheckpointError:
        found = weights_folder.resolve(model)
    check_base(folder, marker, found, shape)
    return {**marker["base"], "path": str(found.absolute())}


def check_base(folder: Path, marker: dict[str, Any], found: Path, shape: MixtralShape) -> None:
    """`CheckpointError` unless `found` holds the weights that the adapters in `folder` were trained on."""
    recorded = marker.get("base") or {}
    digests = None if weights_folder.is_hub(found) else _together(weights_folder.read_marker(found))
    same = adapters.identity(open_weights(found, shape), shape) == recorded.get("identity")
    if not same or (digests and recorded.get("digests") and digests != recorded["digests"]):
        raise CheckpointError(
            f"{found}: isn't the base of the adapters in {folder}: its weights or their type differ from what "
            f"{recorded.get('path')} held when the adapters were trained"
        )
