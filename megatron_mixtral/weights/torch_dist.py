"""Reads and writes Megatron's `torch_dist` folders without megatron-core or torch, by rows, for any division into
chunks.

On disk each chunk of a tensor is one `torch.save` archive inside a `.distcp` file, and `.metadata` is a pickle that
says where. Reading finds the raw bytes in the archive. Writing puts an archive's frame around the copied bytes.
"""

import copy
import json
from collections.abc import Iterable, Iterator
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Self

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import torch_archive
from megatron_mixtral.weights.copying import Files, Target, Unit
from megatron_mixtral.weights.tensors import ITEMSIZE, Rows, megatron_axes, row_width
from megatron_mixtral.weights.torch_archive import Chunk, Tensor, frame

METADATA = ".metadata"
# Room before each chunk's bytes for the end of one archive and the start of the next; it also keeps the bytes
# page-aligned.
GAP = 4096


class TorchDistFolder:
    """The model's tensors of a weights folder, as a source of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_tensors(folder)
        self.files = Files()
        self._places: dict[Chunk, int] = {}
        self._planes: dict[tuple[str, int], dict[tuple[int, ...], list[Chunk]]] = {}

    def apart(self) -> Self:
        """A copy for another thread, with its own files."""
        mine = copy.copy(self)
        mine.files = Files()
        return mine

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def row_bytes(self, name: str) -> int:
        return row_width(self.tensors[name].shape, megatron_axes(name)) * ITEMSIZE[self.dtype(name)]

    def read(self, rows: Rows, out: memoryview) -> None:
        tensor = self.tensors[rows.name]
        axes = len(rows.index)
        width = row_width(tensor.shape, axes)
        for chunk in self._chunks_of(rows):
            first_row, chunk_rows = chunk.offsets[axes], chunk.sizes[axes]
            start, stop = max(rows.start, first_row), min(rows.stop, first_row + chunk_rows)
            if start < stop:
                self._read_chunk(rows, chunk, tensor.dtype, width, slice(start, stop), out)

    def _chunks_of(self, rows: Rows) -> list[Chunk]:
        """The chunks with a part of the plane of `rows`; looked up in a table, because there may be thousands."""
        key = rows.name, len(rows.index)
        if key not in self._planes:
            planes: dict[tuple[int, ...], list[Chunk]] = {}
            for chunk in self.tensors[rows.name].chunks:
                axes = zip(chunk.offsets[: len(rows.index)], chunk.sizes, strict=False)
                for index in product(*(range(first, first + size) for first, size in axes)):
                    planes.setdefault(index, []).append(chunk)
            self._planes[key] = planes  # built as a whole, because other threads use it as well
        return self._planes[key].get(rows.index, [])

    def file_of(self, rows: Rows) -> Path:
        for chunk in self._chunks_of(rows):
            first, size = chunk.offsets[len(rows.index)], chunk.sizes[len(rows.index)]
            if first <= rows.start < first + size:
                return self.folder / chunk.file
        raise AssertionError(f"no chunk holds row {rows.start} of {rows.name}")

    def _read_chunk(self, rows: Rows, chunk: Chunk, dtype: str, width: int, part: slice, out: memoryview) -> None:
        """Read rows `part` of a chunk into `out`, which holds whole rows from `rows.start` on."""
        axes, item = len(rows.index), ITEMSIZE[dtype]
        plane = 0
        for i, first, size in zip(rows.index, chunk.offsets, chunk.sizes, strict=False):
            plane = plane * size + i - first
        columns = row_width(chunk.sizes, axes)
        row = plane * chunk.sizes[axes] + part.start - chunk.offsets[axes]
        place = self._place(chunk, rows.name, dtype) + row * columns * item
        begin, end = (part.start - rows.start) * width * item, (part.stop - rows.start) * width * item
        if columns == width:
            self.files.read(self.folder / chunk.file, place, out[begin:end])
            return
        import numpy as np

        # Tensor parallelism divided the columns: read this chunk's columns and put them between the others'.
        mine = memoryview(bytearray((part.stop - part.start) * columns * item))
        self.files.read(self.folder / chunk.file, place, mine)
        left = chunk.offsets[axes + 1] * item
        whole = np.frombuffer(out[begin:end], np.uint8).reshape(-1, width * item)
        whole[:, left : left + columns * item] = np.frombuffer(mine, np.uint8).reshape(-1, columns * item)

    def _place(self, chunk: Chunk, name: str, dtype: str) -> int:
        """The offset of the chunk's raw bytes in its file."""
        if chunk not in self._places:
            try:
                self._places[chunk] = torch_archive.find_bytes(self.folder, chunk, dtype)
            except Exception as error:  # damaged bytes can raise anything
                where = f"{self.folder / chunk.file}: tensor {name} at {chunk.place}"
                raise CheckpointError(f"{where}: damaged: {error!r}") from error
        return self._places[chunk]

    def spans(self) -> dict[Path, list[tuple[int, int]]]:
        """File -> place and length of each chunk's raw bytes in it."""
        found: dict[Path, list[tuple[int, int]]] = {}
        for name, tensor in self.tensors.items():
            for chunk in tensor.chunks:
                length = prod(chunk.sizes) * ITEMSIZE[tensor.dtype]
                place = self._place(chunk, name, tensor.dtype)
                found.setdefault(self.folder / chunk.file, []).append((place, length))
        return found

    def check(self, wanted: dict[str, tuple[int, ...]], padded: Iterable[str] = ()) -> None:
        """`CheckpointError` at the first tensor that is missing, unexpected, misshapen, incomplete or truncated."""
        where = self.folder / METADATA
        for name, shape in wanted.items():
            if name not in self.tensors:
                raise CheckpointError(f"{where}: tensor {name} is missing")
            found = self.tensors[name].shape
            longer = name in padded and found[1:] == shape[1:] and found[0] >= shape[0]
            if found != shape and not longer:
                raise CheckpointError(
                    f"{where}: tensor {name} has shape {list(found)}; config.json makes it {list(shape)}"
                )
            self._check_chunks(name)
        if extra := sorted(self.tensors.keys() - wanted.keys()):
            raise CheckpointError(f"{where}: tensor {extra[0]} isn't part of the model that config.json describes")

    def fingerprint(self) -> dict[str, list[int]]:
        """Name -> size and modification time of every file read: identifies the source."""
        paths = {self.folder / chunk.file for tensor in self.tensors.values() for chunk in tensor.chunks}
        return {str(p.relative_to(self.folder)): [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)}

    def _check_chunks(self, name: str) -> None:
        tensor = self.tensors[name]
        have = sum(prod(chunk.sizes) for chunk in tensor.chunks)
        if have != prod(tensor.shape):
            raise CheckpointError(
                f"{self.folder}: tensor {name}: its chunks hold {have} of {prod(tensor.shape)} elements"
            )
        for chunk in tensor.chunks:
            path = self.folder / chunk.file
            if not path.is_file():
                raise CheckpointError(f"{path}: missing; holds a part of tensor {name}")
            size = path.stat().st_size
            if size < chunk.place + chunk.length:
                end = chunk.place + chunk.length
                raise CheckpointError(f"{path}: truncated: tensor {name} ends at {end}, the file at {size}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The model's tensors in `.metadata`, without the optimizer's and without other objects."""
    path = folder / METADATA
    try:
        found = torch_archive.read_metadata(path)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(f"{path}: damaged: {error!r}") from error
    model = {n: t for n, t in found.items() if n.startswith(("embedding.", "decoder.", "output_layer."))}
    for name, tensor in model.items():
        if tensor.dtype not in ITEMSIZE:
            raise CheckpointError(f"{path}: tensor {name} is {tensor.dtype}; supported are {', '.join(ITEMSIZE)}")
    return model


def files(targets: Iterable[Target], *, limit: int) -> list[Unit]:
    """The targets, in order, as `.distcp` files of about `limit` bytes."""
    cuts: list[list[Target]] = [[]]
    for target in targets:
        if cuts[-1] and sum(t.nbytes for t in cuts[-1]) + target.nbytes > limit:
            cuts.append([])
        cuts[-1].append(target)
    return [_laid_out(f"__{number}_0.distcp", cut) for number, cut in enumerate(cuts)]


def _laid_out(name: str, targets: list[Target]) -> Unit:
    places, end = [], 0
    for target in targets:
        places.append(ceil(end / GAP) * GAP + GAP)
        end = places[-1] + target.nbytes
    return Unit(name, tuple(targets), tuple(places))


def frames(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of everything around the unit's targets in the archives."""
    for target, place in zip(unit.targets, unit.places, strict=True):
        before, after = frame(target.sizes, target.dtype)
        assert len(before) + len(after) <= GAP, "archives must not touch each other's bytes"
        yield place - len(before), before
        yield place + target.nbytes, after


def write_metadata(
    folder: Path, units: Iterable[Unit], shapes: dict[str, tuple[int, ...]], objects: Iterable[str], file: str
) -> None:
    """Write `.metadata`, and one file with an archived None that all named objects share."""
    tensors: dict[str, Tensor] = {}
    for unit in units:
        for target, place in zip(unit.targets, unit.places, strict=True):
            before, after = frame(target.sizes, target.dtype)
            length = len(before) + target.nbytes + len(after)
            tensor = tensors.setdefault(target.name, Tensor(target.dtype, shapes[target.name]))
            tensor.chunks.append(Chunk(target.offsets, target.sizes, unit.file, place - len(before), length))
    nothing = torch_archive.archive([None])
    (folder / file).write_bytes(nothing)
    empty = dict.fromkeys(objects, (file, 0, len(nothing)))
    (folder / METADATA).write_bytes(torch_archive.metadata(tensors, empty))


def write_common(folder: Path) -> None:
    """Write `common.pt` and `metadata.json`, which megatron-core and upstream's loader need in every checkpoint."""
    content = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    common = {"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}
    (folder / "common.pt").write_bytes(torch_archive.archive(common))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    config |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config))
