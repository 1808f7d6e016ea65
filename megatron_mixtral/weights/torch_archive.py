"""Reads and writes torch's file formats without torch: `torch.save` archives and the `.metadata` of distributed
checkpoints.

Importing torch takes as long as copying some GB, and its unpickling can run code. Here files are assembled from
their parts, and read by an unpickler that builds inert stand-ins and calls nothing.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from megatron_mixtral.weights.tensors import ITEMSIZE

STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}
TYPES = {storage: dtype for dtype, storage in STORAGES.items()}
METADATA = "torch.distributed.checkpoint.metadata"
FILESYSTEM = "torch.distributed.checkpoint.filesystem"


@dataclass(frozen=True)
class Named:
    """Stands, in a pickle, for whatever has this name in this module."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """Stands for what calling it returns."""

    function: Named
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Instance:
    """Stands for an object of a class with this state."""

    of: Named
    state: Any


@dataclass(frozen=True)
class Persistent:
    """Stands for what the reader has under this key: of an archive, a storage."""

    key: tuple[Any, ...]


@dataclass(frozen=True)
class Pairs:
    """Stands for a dictionary whose keys are stand-ins."""

    items: list[tuple[Any, Any]]


class _Pickler(pickle._Pickler):  # the one in Python, whose `save` can be extended
    write: Callable[[bytes], Any]

    def save(self, obj: Any, save_persistent_id: bool = True) -> None:
        if isinstance(obj, Named):
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        elif isinstance(obj, Instance):
            self.save(obj.of)
            self.write(pickle.EMPTY_TUPLE + pickle.NEWOBJ)
            self.save(obj.state)
            self.write(pickle.BUILD)
        elif isinstance(obj, Persistent):
            self.save(obj.key)
            self.write(pickle.BINPERSID)
        elif isinstance(obj, Pairs):
            self.write(pickle.EMPTY_DICT + pickle.MARK)
            for pair in obj.items:
                self.save(pair[0])
                self.save(pair[1])
            self.write(pickle.SETITEMS)
        else:
            super().save(obj, save_persistent_id)  # type: ignore[misc]


def pickled(value: Any) -> bytes:
    """The pickle of builtin values and of the stand-ins above; the same bytes every time."""
    stream = io.BytesIO()
    pickler = _Pickler(stream, protocol=2)
    pickler.fast = True  # no back references: bytes don't depend on which equal objects are one
    pickler.dump(value)
    return stream.getvalue()


@cache
def frame(sizes: tuple[int, ...], dtype: str) -> tuple[bytes, bytes]:
    """What comes before and after a tensor's bytes in the archive that `torch.save` makes of it."""
    pieces, _ = around(pickled(tensor(sizes, dtype, record=0)), [prod(sizes) * ITEMSIZE[dtype]])
    return pieces[0][1], pieces[1][1]


def tensor(sizes: tuple[int, ...], dtype: str, *, record: int) -> Call:
    """Stands, in the pickle of an archive, for the tensor whose bytes are the record `data/RECORD`."""
    storage = Persistent(("storage", Named("torch", STORAGES[dtype]), str(record), "cpu", prod(sizes)))
    strides = tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
    hooks = Call(Named("collections", "OrderedDict"), ())
    return Call(Named("torch._utils", "_rebuild_tensor_v2"), (storage, 0, sizes, strides, False, hooks))


def archive(value: Any) -> bytes:
    """What `torch.save` makes of a value without tensors."""
    return around(pickled(value), [])[0][0][1]


def around(description: bytes, sizes: Sequence[int]) -> tuple[list[tuple[int, bytes]], list[int]]:
    """An archive of a pickle and of one record of each size, without the records' own bytes.

    Place and bytes of the pieces between which those go, and the place of each record. As it lies in the file:

        header, data.pkl | header, byteorder | header, version    pieces[0]: all that comes
        header of data/0, padded so that the record's place       before the first record
          divides by 64
        the bytes of data/0                                       places[0], not ours to write
        header of data/1, padded                                  pieces[1]
        the bytes of data/1                                       places[1]
        ...
        directory: an entry for each of the above                 pieces[-1]
        extended end (beyond 4 GiB or 65535 records), end
    """
    body, directory = b"", []
    for name, data in (("data.pkl", description), ("byteorder", b"little"), ("version", b"3\n")):
        checksum = zlib.crc32(data)
        directory.append(_header(b"PK\x01\x02", name, checksum, len(data), place=len(body)))
        body += _header(b"PK\x03\x04", name, checksum, len(data)) + data
    pieces, places, begin = [], [], 0
    for number, size in enumerate(sizes):
        assert size < 1 << 32, "a plain zip holds records below 4 GiB"
        # No checksum, as torch may leave it out: its reader doesn't look.
        name, at = f"data/{number}", begin + len(body)
        directory.append(_header(b"PK\x01\x02", name, 0, size, place=at))
        padding = (
            -(at + len(_header(b"PK\x03\x04", name, 0, size)) + 4) % 64
        )  # aligned as torch does, so it can be mapped
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        pieces.append((begin, body + _header(b"PK\x03\x04", name, 0, size, extra=extra)))
        places.append(begin + len(pieces[-1][1]))
        body, begin = b"", places[-1] + size
    return [*pieces, (begin, body + _end(directory, begin + len(body)))], places


FULL = (1 << 32) - 1  # in a 32-bit field: see the extended field


def _end(directory: list[bytes], place: int) -> bytes:
    """A zip's directory and end record; beyond 4 GiB with the extended records."""
    listing, count, extended = b"".join(directory), len(directory), b""
    if place >= FULL or count >= 0xFFFF:
        at = place + len(listing)
        extended = struct.pack(
            "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(listing), place
        ) + struct.pack("<4sLQL", b"PK\x06\x07", 0, at, 1)
        place, count = FULL, min(count, 0xFFFF)
    return listing + extended + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(listing), place, 0)


def _header(
    kind: bytes, name: str, checksum: int, size: int, *, place: int | None = None, extra: bytes = b""
) -> bytes:
    """A record's header; with `place`, its entry in the directory."""
    full = f"archive/{name}".encode()
    if place is not None and place >= FULL:
        extra, place = struct.pack("<2HQ", 1, 8, place), FULL
    versions = struct.pack("<H", 45 if place == FULL else 20) * (1 if place is None else 2)
    common = struct.pack("<4H3L2H", 0, 0, 0, 0, checksum, size, size, len(full), len(extra))
    attributes = b"" if place is None else struct.pack("<3H2L", 0, 0, 0, 0, place)
    return kind + versions + common + attributes + full + extra


@dataclass(frozen=True, slots=True)
class Chunk:
    """A rectangular part of a tensor, and the archive that holds it."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    place: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in its chunks."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk] = field(default_factory=list)


def metadata(tensors: dict[str, Tensor], objects: dict[str, tuple[str, int, int]]) -> bytes:
    """The contents of `.metadata`; `objects` are name -> file, place and length."""
    entries: dict[str, Any] = {}
    storage: list[tuple[Any, Any]] = []
    for name, tensor in tensors.items():
        boxes = []
        for number, chunk in enumerate(tensor.chunks):
            boxes.append(_of("ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes)))
            storage.append(_placed(name, _size(chunk.offsets), number, chunk.file, chunk.place, chunk.length))
        properties = Instance(Named(METADATA, "TensorProperties"), _properties(tensor.dtype))
        entries[name] = _of("TensorStorageMetadata", properties=properties, size=_size(tensor.shape), chunks=boxes)
    for name, (file, place, length) in objects.items():
        entries[name] = _of("BytesStorageMetadata")
        storage.append(_placed(name, None, None, file, place, length))
    known: dict[str, Any] = {"planner_data": {}, "storage_meta": None, "version": None}
    return pickled(_of("Metadata", state_dict_metadata=entries, storage_data=Pairs(storage), **known))


def _of(name: str, **state: Any) -> Instance:
    return Instance(Named(METADATA, name), state)


def _size(sizes: Sequence[int]) -> Call:
    return Call(Named("torch", "Size"), (tuple(sizes),))


def _properties(dtype: str) -> tuple[Any, ...]:
    """Type, layout, gradient, memory format (contiguous) and pinning of a tensor."""
    layout = Call(Named("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Named(METADATA, "_MEM_FORMAT_ENCODING"), (0,))
    return Named("torch", dtype), layout, False, contiguous, False


def _placed(
    name: str, offset: Call | None, number: int | None, file: str, place: int, length: int
) -> tuple[Instance, Instance]:
    stored = {"relative_path": file, "offset": place, "length": length}
    index = _of("MetadataIndex", fqn=name, index=number, offset=offset)
    return index, Instance(Named(FILESYSTEM, "_StorageInfo"), stored)


class Inert:
    """An unpickled object that isn't a builtin container: its parts, without behaviour."""

    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any, **_: Any) -> "Inert":
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


@cache
def _inert(module: str, name: str) -> type[Inert]:
    return type(name, (Inert,), {"__module__": module})


HARMLESS = {
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): defaultdict,
    ("builtins", "set"): set,
    ("builtins", "dict"): dict,
    ("builtins", "list"): list,
}


class _Unpickler(pickle.Unpickler):
    """Builds builtin containers and `Inert` objects, whatever the file asks for."""

    def find_class(self, module: str, name: str) -> Any:
        return HARMLESS.get((module, name)) or _inert(module, name)

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_metadata(path: Path) -> dict[str, Tensor]:
    """The tensors that a `.metadata` describes. Raises whatever damaged bytes raise."""
    found = _Unpickler(io.BytesIO(path.read_bytes())).load()
    placed = {(k.fqn, getattr(k, "offset", None)): v for k, v in found.storage_data.items()}  # objects have none
    tensors = {}
    for name, entry in found.state_dict_metadata.items():
        if type(entry).__name__ != "TensorStorageMetadata":
            continue
        tensors[name] = Tensor(entry.properties.state[0].__name__, _whole(entry.size))
        for box in entry.chunks:
            stored = placed[name, box.offsets]
            place, length = _whole((stored.offset, stored.length))
            chunk = Chunk(_whole(box.offsets), _whole(box.sizes), stored.relative_path, place, length)
            tensors[name].chunks.append(chunk)
    return tensors


def _whole(numbers: Any) -> tuple[int, ...]:
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{numbers} aren't whole numbers")
    return tuple(numbers)


def find_bytes(folder: Path, chunk: Chunk, dtype: str) -> int:
    """The offset of the chunk's raw bytes in its file. Damaged bytes can raise any error, or a `ValueError` with a
    message.
    """
    with (folder / chunk.file).open("rb") as stream:
        part = io.BufferedReader(_Part(stream, chunk.place, chunk.length))
        value, record = _opened(part)
        found, begin = _tensor(value, record)
    if prod(found.shape) != prod(chunk.sizes):
        raise ValueError(f"holds {found.shape} where {chunk.sizes} should be in a row")
    if found.dtype != dtype:
        raise ValueError(f"holds {found.dtype}, not {dtype}")
    return chunk.place + begin


def read_archive(path: Path) -> tuple[Any, Callable[[Any], tuple[Tensor, int]]]:
    """The value in a `torch.save` file with tensors as stand-ins, and a function for a stand-in's type, shape and
    offset.
    """
    with path.open("rb") as stream:
        value, record = _opened(stream)
    return value, lambda stand_in: _tensor(stand_in, record)


def _opened(stream: Any) -> tuple[Any, Callable[[str], tuple[int, int]]]:
    """The pickled value of an archive, and a function for offset and size of its record `data/KEY`."""
    with zipfile.ZipFile(stream) as records:
        root = records.namelist()[0].split("/", 1)[0]
        about = records.getinfo(f"{root}/data.pkl")
        stream.seek(_begin(stream, about))  # not checked, because torch may leave out the checksum
        value = _Unpickler(io.BytesIO(stream.read(about.file_size))).load()
        places = {info.filename: (_begin(stream, info), info.file_size) for info in records.infolist()}
        if max(begin + size for begin, size in places.values()) > stream.seek(0, os.SEEK_END):
            raise ValueError("holds a record that ends behind it")
    return value, lambda key: places[f"{root}/data/{key}"]


def _tensor(value: Any, record: Callable[[str], tuple[int, int]]) -> tuple[Tensor, int]:
    """Type, shape and place of the tensor that `value` stands for."""
    if (type(value).__module__, type(value).__name__) != ("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError(f"holds a {type(value).__module__}.{type(value).__name__}, not a tensor")
    storage, start, shape, strides = value.arguments[:4]
    if tuple(strides) != tuple(prod(shape[i + 1 :]) for i in range(len(shape))):
        raise ValueError(f"holds {tuple(shape)} with strides {tuple(strides)}, not in a row")
    if (dtype := TYPES.get(storage[1].__name__)) is None:
        raise ValueError(f"holds a {storage[1].__name__}; supported are {', '.join(STORAGES.values())}")
    begin, size = record(str(storage[2]))
    if (start + prod(shape)) * ITEMSIZE[dtype] > size:
        raise ValueError(f"holds {size} bytes, fewer than its shape needs")
    return Tensor(dtype, tuple(shape)), begin + start * ITEMSIZE[dtype]


def _begin(part: Any, info: zipfile.ZipInfo) -> int:
    part.seek(info.header_offset)
    head = part.read(30)
    return info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


class _Part(io.RawIOBase):
    """A part of a file as a file object, for `zipfile`."""

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
