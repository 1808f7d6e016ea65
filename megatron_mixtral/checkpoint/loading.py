"""Loads a rank's part of a model straight from files, in place and by rows, in Megatron's or the hub's layout.

Several threads read ahead while values are copied into the parameters. A rank reads only what it needs. Nothing is
written or converted first.
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.checkpoint import digests, save_load
from megatron_mixtral.model import fp8
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import merged
from megatron_mixtral.weights.copying import Source, WeightsFolder, read_rows
from megatron_mixtral.weights.hub import HubRows
from megatron_mixtral.weights.tensors import PADDED, Rows, megatron_axes

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
)

BLOCK = 64 << 20  # bytes read at a time
READERS = 4  # threads; a parallel file system or a page cache is faster with several


@dataclass(frozen=True, slots=True)
class ParameterRows:
    """Some rows of a stored tensor, and the rows and columns of a parameter that they fill.

    A parameter in FP8 has a scale for each of its rows.
    """

    rows: Rows
    columns: slice
    into: Tensor
    scale: Tensor | None = None


def load(model: Any, folder: Path, *, base: str | None = None, progress: Callable[[int], Any] = int) -> None:
    """Fill `model`, built without random weights, from `folder`; a missing tensor is an error with its name.

    Adapters are merged into their base, which is at its path from the training, or at `base`. `progress` is called
    with numbers of loaded bytes; their sum is `size(model)`.
    """
    plain = save_load.unwrap(model)
    source, lengths = _open(folder, plain.shape, base)
    state = save_load.weights_wanted(plain)
    factories, _ = extract_matching_values(
        state, lambda value: isinstance(value, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)
    shards: list[ShardedTensor] = []

    def listed(shard: ShardedTensor) -> Tensor:
        shards.append(shard)
        return shard.data

    dict_list_map_inplace(listed, state)
    with torch.no_grad(), ThreadPoolExecutor(READERS, thread_name_prefix="read") as readers:
        _fill(source, (block for shard in shards for block in _blocks(shard, source, lengths)), readers, progress)
    save_load.fill(plain, apply_factory_merges(state, factories), folder)


def start(chunks: list[Any], folder: Path) -> None:
    """Fill a model for training, without its adapters; files with known digests are compared first.

    Adapters in `folder` are merged into their base.
    """
    if weights_folder.is_hub(folder) or merged.is_adapter(folder):
        if weights_folder.is_hub(folder) and (folder / rundir.MARKER).is_file():
            digests.check(folder, weights_folder.read_marker(folder))
        for chunk in chunks:
            load(chunk, folder)
    else:
        save_load.load_weights(chunks, folder, whole=True)


def size(model: Any) -> int:
    """Bytes of this rank's parameters."""
    return sum(p.numel() * p.element_size() for p in save_load.unwrap(model).parameters())


def _open(folder: Path, shape: MixtralShape, base: str | None) -> tuple[WeightsFolder, dict[str, int]]:
    """The checked source, and the number of vocabulary rows in it, which tensor parallelism may pad."""
    if not weights_folder.is_hub(folder) and not merged.is_adapter(folder):
        save_load.verify(folder, shape)
    source = merged.open_weights(folder, shape, base=base)
    stored: Any = source.base if isinstance(source, merged.Merged) else source
    if isinstance(stored, HubRows):
        return source, dict.fromkeys(PADDED, shape.vocab_size)
    return source, {name: stored.tensors[name].shape[0] for name in PADDED if name in stored.tensors}


def _blocks(shard: ShardedTensor, source: Source, lengths: dict[str, int]) -> Iterator[ParameterRows]:
    """The shard plane by plane (layer, expert), each in runs of rows; padding rows become zero."""
    axes = megatron_axes(shard.key)
    offset, data = tuple(shard.global_offset), shard.data
    scales = getattr(shard, "scales", None)
    for number, (index, plane) in enumerate(_planes(data, offset[:axes], axes - shard.prepend_axis_num)):
        matrix = plane if plane.dim() > 1 else plane.unsqueeze(1)
        first = offset[axes]
        column = offset[axes + 1] if plane.dim() > 1 else 0
        count = min(matrix.shape[0], max(lengths.get(shard.key, first + matrix.shape[0]) - first, 0))
        matrix[count:].zero_()
        step = max(1, BLOCK // source.row_bytes(shard.key))
        for start in range(0, count, step):
            stop = min(start + step, count)
            rows = Rows(shard.key, index, first + start, first + stop)
            scale = None if scales is None else scales[number, start:stop]
            yield ParameterRows(rows, slice(column, column + matrix.shape[1]), matrix[start:stop], scale)


def _planes(data: Tensor, first: tuple[int, ...], own: int) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Each plane of a shard with its index; the last `own` of the leading axes are the shard's own."""
    assert own in (0, 1), "layers come one by one, experts may come together"
    if own == 0:
        yield first, data
        return
    for number, plane in enumerate(data):
        yield (*first[:-1], first[-1] + number), plane


def _fill(
    source: Any, blocks: Iterable[ParameterRows], readers: ThreadPoolExecutor, progress: Callable[[int], Any]
) -> None:
    """Read ahead by one block for each reader, and copy each block into its parameter."""
    own = threading.local()

    def read(block: ParameterRows) -> Tensor:
        if not hasattr(own, "source"):
            own.source = source.apart()
        rows = block.rows
        stored = torch.frombuffer(read_rows(own.source, rows), dtype=getattr(torch, source.dtype(rows.name)))
        return stored.view(len(rows), -1)[:, block.columns]

    waiting: list[tuple[ParameterRows, Future[Tensor]]] = []

    def put() -> None:
        block, values = waiting.pop(0)
        if block.scale is None:
            block.into.copy_(values.result())
        else:
            fp8.quantize(values.result().to(block.into.device), block.into, block.scale)
        progress(block.into.numel() * block.into.element_size())

    try:
        for block in blocks:
            waiting.append((block, readers.submit(read, block)))
            if len(waiting) > READERS:
                put()
        while waiting:
            put()
    finally:
        for _, future in waiting:
            future.cancel()
