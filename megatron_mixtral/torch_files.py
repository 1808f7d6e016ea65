"""torch's own file formats without torch: `torch.save` archives and the `.metadata` of distributed checkpoints.

Importing torch takes as long as copying some GB, and unpickling by it runs what the file says. Here files are put
together from their parts, and read by an unpickler that builds inert stand-ins and calls nothing.
"""

import io
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
STORAGES = {"bfloat16": "BFloat16Storage", "float16": "HalfStorage", "float32": "FloatStorage"}
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
            super().save(obj, save_persistent_id)


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
    count = prod(sizes)
    strides = tuple(prod(sizes[i + 1 :]) for i in range(len(sizes)))
    storage = Persistent(("storage", Named("torch", STORAGES[dtype]), "0", "cpu", count))
    hooks = Call(Named("collections", "OrderedDict"), ())
    about = (storage, 0, sizes, strides, False, hooks)
    description = pickled(Call(Named("torch._utils", "_rebuild_tensor_v2"), about))
    return _archive(description, hole=count * ITEMSIZE[dtype])


def archive(value: Any) -> bytes:
    """What `torch.save` makes of a value without tensors."""
    return b"".join(_archive(pickled(value), hole=None))


def _archive(description: bytes, *, hole: int | None) -> tuple[bytes, bytes]:
    """A zip of uncompressed records, up to the bytes of `data/0`, of which there are `hole`, and from there on."""
    body, directory = b"", []
    for name, data in (("data.pkl", description), ("byteorder", b"little"), ("version", b"3\n")):
        checksum = zlib.crc32(data)
        directory.append(_header(b"PK\x01\x02", name, checksum, len(data), place=len(body)))
        body += _header(b"PK\x03\x04", name, checksum, len(data)) + data
    if hole is not None:
        assert hole < 1 << 32, "a plain zip holds records below 4 GiB"
        # No checksum, as torch may leave it out: its reader doesn't look.
        directory.append(_header(b"PK\x01\x02", "data/0", 0, hole, place=len(body)))
        unpadded = len(body) + len(_header(b"PK\x03\x04", "data/0", 0, hole)) + 4
        padding = -unpadded % 64  # as torch does, so that the bytes can be mapped into memory where they are
        body += _header(
            b"PK\x03\x04", "data/0", 0, hole, extra=struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        )
    listing, end = b"".join(directory), len(body) + (hole or 0)
    count = len(directory)
    return body, listing + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(listing), end, 0)


def _header(
    kind: bytes, name: str, checksum: int, size: int, *, place: int | None = None, extra: bytes = b""
) -> bytes:
    """What stands before a record's data; with `place`, its entry in the directory at the end."""
    full = f"archive/{name}".encode()
    versions = struct.pack("<H", 20) * (1 if place is None else 2)
    common = struct.pack("<4H3L2H", 0, 0, 0, 0, checksum, size, size, len(full), len(extra))
    attributes = b"" if place is None else struct.pack("<3H2L", 0, 0, 0, 0, place)
    return kind + versions + common + attributes + full + extra


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the archive that holds it."""

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
    known = {"planner_data": {}, "storage_meta": None, "version": None}
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
    """What an unpickled object becomes when it is none of the builtin containers: its parts, and no behaviour."""

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
        tensors[name] = Tensor(entry.properties.state[0].__name__, tuple(entry.size))
        for box in entry.chunks:
            stored = placed[name, box.offsets]
            chunk = Chunk(box.offsets, box.sizes, stored.relative_path, stored.offset, stored.length)
            tensors[name].chunks.append(chunk)
    return tensors


def find_bytes(folder: Path, chunk: Chunk, dtype: str) -> int:
    """Where in the chunk's file its raw bytes begin. Raises whatever damaged bytes raise, `ValueError` by name."""
    with (folder / chunk.file).open("rb") as stream:
        part = io.BufferedReader(_Part(stream, chunk.place, chunk.length))  # type: ignore[type-var]
        with zipfile.ZipFile(part) as records:
            root = records.namelist()[0].split("/", 1)[0]
            about, data = records.getinfo(f"{root}/data.pkl"), records.getinfo(f"{root}/data/0")
            part.seek(_begin(part, about))  # unchecked: torch may leave its checksum out
            tensor = _Unpickler(io.BytesIO(part.read(about.file_size))).load()
            begin = _begin(part, data)
    if (type(tensor).__module__, type(tensor).__name__) != ("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError(f"holds a {type(tensor).__module__}.{type(tensor).__name__}, not a tensor")
    storage, start, shape, strides = tensor.arguments[:4]
    dense = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
    if prod(shape) != prod(chunk.sizes) or tuple(strides) != dense:
        raise ValueError(
            f"holds {tuple(shape)} with strides {tuple(strides)} where {chunk.sizes} should be in a row"
        )
    if storage[1].__name__ != STORAGES[dtype]:
        raise ValueError(f"holds a {storage[1].__name__}, not {dtype}")
    if (start + prod(shape)) * ITEMSIZE[dtype] > data.file_size:
        raise ValueError(f"holds {data.file_size} bytes, fewer than its shape needs")
    return chunk.place + begin + start * ITEMSIZE[dtype]


def _begin(part: Any, info: zipfile.ZipInfo) -> int:
    part.seek(info.header_offset)
    head = part.read(30)
    return info.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")


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
