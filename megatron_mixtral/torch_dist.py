"""Megatron's `torch_dist` folders without megatron-core: tensors read by rows, however they were cut; and written.

On disk each chunk of a tensor is one `torch.save` archive inside a `.distcp` file, and `.metadata` is a pickle that
says where. Reading finds the raw bytes in the archive; writing puts an archive's frame around bytes already copied.
"""

import io
import json
import os
import pickle
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_mixtral.copying import ITEMSIZE, Files, Target, Unit
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import Rows, megatron_axes, row_width

METADATA = ".metadata"
# Room before each chunk's bytes for the end of one archive and the start of the next; it keeps bytes page-aligned.
GAP = 4096


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    place: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class TorchDistFolder:
    """The model's tensors of a weights folder, as a source of rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors = read_tensors(folder)
        self.files = Files()
        self._places: dict[Chunk, int] = {}

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def row_bytes(self, name: str) -> int:
        return row_width(self.tensors[name].shape, megatron_axes(name)) * ITEMSIZE[self.dtype(name)]

    def read(self, rows: Rows, out: memoryview) -> None:
        tensor = self.tensors[rows.name]
        axes = len(rows.index)
        width = row_width(tensor.shape, axes)
        for chunk in tensor.chunks:
            inside = zip(rows.index, chunk.offsets, chunk.sizes, strict=False)
            if not all(first <= i < first + size for i, first, size in inside):
                continue
            first_row, chunk_rows = chunk.offsets[axes], chunk.sizes[axes]
            start, stop = max(rows.start, first_row), min(rows.stop, first_row + chunk_rows)
            if start < stop:
                self._read_chunk(rows, chunk, tensor.dtype, width, slice(start, stop), out)

    def _read_chunk(self, rows: Rows, chunk: Chunk, dtype: str, width: int, part: slice, out: memoryview) -> None:
        """Rows `part` of a chunk to their place in `out`, which holds whole rows from `rows.start` on."""
        axes, item = len(rows.index), ITEMSIZE[dtype]
        plane = 0
        for i, first, size in zip(rows.index, chunk.offsets, chunk.sizes, strict=False):
            plane = plane * size + i - first
        columns = row_width(chunk.sizes, axes)
        row = plane * chunk.sizes[axes] + part.start - chunk.offsets[axes]
        place = self._place(chunk, rows.name, dtype) + row * columns * item
        begin, end = (part.start - rows.start) * width * item, (part.stop - rows.start) * width * item
        if columns == width:
            self.files.read(chunk.path, place, out[begin:end])
            return
        import numpy as np

        # Tensor parallelism cut the columns: read this chunk's and set them between the others'.
        mine = memoryview(bytearray((part.stop - part.start) * columns * item))
        self.files.read(chunk.path, place, mine)
        left = chunk.offsets[axes + 1] * item
        whole = np.frombuffer(out[begin:end], np.uint8).reshape(-1, width * item)
        whole[:, left : left + columns * item] = np.frombuffer(mine, np.uint8).reshape(-1, columns * item)

    def _place(self, chunk: Chunk, name: str, dtype: str) -> int:
        """Where the chunk's raw bytes begin in its file."""
        if chunk not in self._places:
            self._places[chunk] = find_bytes(chunk, name, dtype)
        return self._places[chunk]

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
        """Name -> size and time of change of every file read: what makes it the same source later."""
        paths = {chunk.path for tensor in self.tensors.values() for chunk in tensor.chunks}
        return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in sorted(paths)}

    def _check_chunks(self, name: str) -> None:
        tensor = self.tensors[name]
        have = sum(prod(chunk.sizes) for chunk in tensor.chunks)
        if have != prod(tensor.shape):
            raise CheckpointError(
                f"{self.folder}: tensor {name}: its chunks hold {have} of {prod(tensor.shape)} elements"
            )
        for chunk in tensor.chunks:
            if not chunk.path.is_file():
                raise CheckpointError(f"{chunk.path}: missing; holds a part of tensor {name}")
            size = chunk.path.stat().st_size
            if size < chunk.place + chunk.length:
                end = chunk.place + chunk.length
                raise CheckpointError(f"{chunk.path}: truncated: tensor {name} ends at {end}, the file at {size}")


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The model's tensors by `.metadata`: not an optimizer's, nor objects that aren't tensors."""
    metadata = read_metadata(folder)
    found = {}
    for name, entry in metadata.state_dict_metadata.items():
        if not hasattr(entry, "chunks") or not name.startswith(("embedding.", "decoder.", "output_layer.")):
            continue
        dtype = str(entry.properties.dtype).removeprefix("torch.")
        if dtype not in ITEMSIZE:
            raise CheckpointError(
                f"{folder / METADATA}: tensor {name} is {dtype}; supported are {', '.join(ITEMSIZE)}"
            )
        chunks = tuple(_chunk(folder, metadata, name, chunk) for chunk in entry.chunks)
        found[name] = Tensor(dtype, tuple(entry.size), chunks)
    return found


def _chunk(folder: Path, metadata: Any, name: str, chunk: Any) -> Chunk:
    from torch.distributed.checkpoint.metadata import MetadataIndex

    stored = metadata.storage_data.get(MetadataIndex(name, chunk.offsets))
    if stored is None:
        raise CheckpointError(f"{folder / METADATA}: no place for tensor {name} at {list(chunk.offsets)}")
    path = folder / stored.relative_path
    return Chunk(tuple(chunk.offsets), tuple(chunk.sizes), path, stored.offset, stored.length)


def read_metadata(folder: Path) -> Any:
    """The unpickled `.metadata`. Only for folders whose owner is trusted: a pickle is code."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(folder).read_metadata()
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder / METADATA}: missing") from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(f"{folder / METADATA}: damaged: {error!r}") from error


class _Part(io.RawIOBase):
    """A part of a file as a file: what `zipfile` needs."""

    def __init__(self, stream: io.BufferedReader, place: int, length: int) -> None:
        self._stream, self._first, self._length, self._at = stream, place, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, out: Any) -> int:
        count = max(0, min(len(out), self._length - self._at))
        self._stream.seek(self._first + self._at)
        data = self._stream.read(count)
        out[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Description(pickle.Unpickler):
    """Reads what `torch.save` wrote about one tensor, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, size, stride, *_: (storage, start, tuple(size), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} doesn't belong in a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid


def find_bytes(chunk: Chunk, name: str, dtype: str) -> int:
    """Where in `chunk.path` the raw bytes of the chunk begin; `CheckpointError` when they aren't as expected."""
    try:
        with chunk.path.open("rb") as stream:
            part = io.BufferedReader(_Part(stream, chunk.place, chunk.length))  # type: ignore[type-var]
            with zipfile.ZipFile(part) as archive:
                root = archive.namelist()[0].split("/", 1)[0]
                about, data = archive.getinfo(f"{root}/data.pkl"), archive.getinfo(f"{root}/data/0")
                part.seek(_begin_of_record(part, about))  # unchecked: torch may write it without its checksum
                description = _Description(io.BytesIO(part.read(about.file_size))).load()
                begin, size = _begin_of_record(part, data), data.file_size
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(f"{chunk.path}: tensor {name} at {chunk.place}: damaged: {error!r}") from error
    storage, start, shape, stride = description
    dense = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    expected = prod(chunk.sizes) * ITEMSIZE[dtype]
    if prod(shape) != prod(chunk.sizes) or stride != dense or (start + prod(shape)) * ITEMSIZE[dtype] > size:
        raise CheckpointError(f"{chunk.path}: tensor {name} at {chunk.place}: isn't {expected} bytes in a row")
    if storage[1].removesuffix("Storage").lower() != {"float32": "float", "float16": "half"}.get(dtype, dtype):
        raise CheckpointError(f"{chunk.path}: tensor {name} at {chunk.place}: is {storage[1]}, not {dtype}")
    return chunk.place + begin + start * ITEMSIZE[dtype]


def _begin_of_record(part: Any, info: zipfile.ZipInfo) -> int:
    part.seek(info.header_offset)
    head = part.read(30)
    return info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


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
        places.append(-(-end // GAP) * GAP + GAP)
        end = places[-1] + target.nbytes
    return Unit(name, tuple(targets), tuple(places))


def frames(unit: Unit) -> Iterator[tuple[int, bytes]]:
    """Place and bytes of all that makes archives of the unit's targets once their own bytes are in place."""
    for target, place in zip(unit.targets, unit.places, strict=True):
        before, after = frame(target.sizes, target.dtype)
        assert len(before) + len(after) <= GAP, "archives must not touch each other's bytes"
        yield place - len(before), before
        yield place + target.nbytes, after


@cache
def frame(sizes: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the bytes of such a tensor, without touching that much memory."""
    import torch

    nbytes = prod(sizes) * ITEMSIZE[dtype]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "archive.pt")
        with torch.serialization.skip_data():  # leaves a hole in the file where the bytes go
            torch.save(torch.empty(sizes, dtype=getattr(torch, dtype)), path)
        begin = find_bytes(Chunk((0,) * len(sizes), sizes, path, 0, path.stat().st_size), "", dtype)
        with path.open("rb") as stream:
            before = stream.read(begin)
            stream.seek(begin + nbytes)
            return before, stream.read()


def write_metadata(folder: Path, units: Iterable[Unit], shapes: dict[str, tuple[int, ...]], objects: Unit) -> None:
    """Write `.metadata`, and the objects' file with all that they share: one archived None."""
    import torch
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    nothing = io.BytesIO()
    torch.save([None], nothing)
    (folder / objects.file).write_bytes(nothing.getvalue())
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for unit in units:
        for target, place in zip(unit.targets, unit.places, strict=True):
            before, after = frame(target.sizes, target.dtype)
            properties = TensorProperties(dtype=getattr(torch, target.dtype))
            size = torch.Size(shapes[target.name])
            entry = entries.setdefault(target.name, TensorStorageMetadata(properties, size, []))
            index = MetadataIndex(target.name, target.offsets, len(entry.chunks))
            entry.chunks.append(ChunkStorageMetadata(torch.Size(target.offsets), torch.Size(target.sizes)))
            length = len(before) + target.nbytes + len(after)
            storage[index] = _StorageInfo(unit.file, place - len(before), length)
    for target in objects.targets:
        entries[target.name] = BytesStorageMetadata()
        storage[MetadataIndex(target.name)] = _StorageInfo(objects.file, 0, len(nothing.getvalue()))
    metadata = Metadata(state_dict_metadata=entries, planner_data={}, storage_data=storage)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))


def write_common(folder: Path) -> None:
    """`common.pt` and `metadata.json`: what megatron-core asks of every checkpoint, and upstream's loader of it."""
    import torch

    content = {"singleton_local_shards": False, "non_homogeneous_layers": False}
    torch.save({"checkpoint_version": 3.0, "iteration": 0, "content_metadata": content}, folder / "common.pt")
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(config | common))
