"""A folder in the hub's layout: what tensors its safetensors hold, read by rows; and files of that kind, laid out.

Every header is checked against its file and the model's shape before a byte of data is read, so that a damaged
folder is refused at once, by the name of the file and the tensor.
"""

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import ceil, prod
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.copying import Files, Target, Unit
from megatron_mixtral.weights.tensors import ITEMSIZE, Names, Rows, hub_shapes, links

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CODES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LONGEST_HEADER = 100_000_000  # what safetensors itself reads
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor's bytes lie."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class HubFolder:
    """The tensors of a hub folder, as a source of rows."""

    def __init__(self, folder: Path, tensors: dict[str, Stored] | None = None) -> None:
        self.folder = folder
        self.tensors = read_headers(folder) if tensors is None else tensors
        self.files = Files()

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype

    def row_bytes(self, name: str) -> int:
        # The experts of a fused tensor are planes of [rows, columns]: in every tensor a row is its last axis.
        shape = self.tensors[name].shape
        return (shape[-1] if len(shape) > 1 else 1) * ITEMSIZE[self.tensors[name].dtype]

    def read(self, rows: Rows, out: memoryview) -> None:
        stored = self.tensors[rows.name]
        first = rows.start + (rows.index[0] * stored.shape[1] if rows.index else 0)
        self.files.read(stored.path, stored.offset + first * self.row_bytes(rows.name), out)

    def file_of(self, rows: Rows) -> Path:
        return self.tensors[rows.name].path

    def spans(self) -> dict[Path, list[tuple[int, int]]]:
        """File -> place and length of each tensor in it."""
        found: dict[Path, list[tuple[int, int]]] = {}
        for stored in self.tensors.values():
            found.setdefault(stored.path, []).append((stored.offset, _nbytes(stored)))
        return found

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """`InputError` at the first tensor that is missing, unexpected or of another shape."""
        for name, shape in wanted.items():
            if name not in self.tensors:
                raise InputError(f"{self.folder}: tensor {name} is missing")
            stored = self.tensors[name]
            if stored.shape != shape:
                found, made = list(stored.shape), list(shape)
                raise InputError(f"{stored.path}: tensor {name} has shape {found}; config.json makes it {made}")
        for name, stored in self.tensors.items():
            if name not in wanted:
                raise InputError(f"{stored.path}: tensor {name} isn't part of the model that config.json describes")

    def drop_copy(self, name: str, *, of: str) -> None:
        """Forget a tensor that a tied model stores twice; `InputError` when the two differ."""
        if name not in self.tensors or of not in self.tensors:
            return
        one, other = self.tensors[name], self.tensors[of]
        same = one.shape == other.shape and one.dtype == other.dtype
        for row in range(one.shape[0] if same else 0):
            a, b = (memoryview(bytearray(self.row_bytes(name))) for _ in range(2))
            self.read(Rows(name, (), row, row + 1), a)
            self.read(Rows(of, (), row, row + 1), b)
            same = same and a == b
        if not same:
            raise InputError(f"{one.path}: config.json ties {name} to {of}, but the two differ")
        del self.tensors[name]

    def fingerprint(self) -> dict[str, list[int]]:
        """Name -> size and modification time of every file read: identifies the source."""
        paths = sorted({stored.path for stored in self.tensors.values()})
        return {p.name: [p.stat().st_size, p.stat().st_mtime_ns] for p in paths}


def open_model(folder: Path, shape: MixtralShape) -> tuple[HubFolder, Names]:
    """The folder with exactly the tensors of `shape`, and how it names them; `InputError` for any other."""
    found = HubFolder(folder)
    if shape.tie_word_embeddings:
        found.drop_copy("lm_head.weight", of="model.embed_tokens.weight")
    names = Names.found_in(found.tensors)
    most = shape.num_hidden_layers * (1 if names.fused else shape.num_local_experts)
    if most > len(found.tensors):  # each of them would have several; they may be too many to list
        there = f"{shape.num_hidden_layers} layers of {shape.num_local_experts} experts"
        raise InputError(f"{folder}: holds {len(found.tensors)} tensors; config.json tells of {there}")
    found.check(hub_shapes(shape, names))
    return found, names


def read_headers(folder: Path) -> dict[str, Stored]:
    """Tensor -> place, for all safetensors of the folder; `InputError` names what is wrong with which file."""
    index = read_index(folder)
    files = sorted(set(index.values())) if index else unindexed(folder)
    tensors: dict[str, Stored] = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / INDEX}: names {file}, which isn't there")
        for name, stored in read_header(folder / file).items():
            if name in tensors:
                raise InputError(f"{stored.path}: tensor {name} is in {tensors[name].path.name} too")
            if index and index.get(name) != file:
                said = f"which {INDEX} places in {index[name]}" if name in index else f"which {INDEX} doesn't name"
                raise InputError(f"{stored.path}: holds tensor {name}, {said}")
            tensors[name] = stored
    for name, file in index.items():
        if name not in tensors:
            raise InputError(f"{folder / file}: tensor {name}, which {INDEX} places here, is missing")
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Tensor -> file; empty when the folder has no index, or one file that needs none."""
    path = folder / INDEX
    if not path.exists() or (folder / SINGLE).is_file():  # transformers goes by the single file, too
        return {}
    try:
        weight_map = json.loads(path.read_text())["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
            raise ValueError("weight_map must give plain file names")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not an index of safetensors: {error!r}") from error
    return dict(weight_map)


def unindexed(folder: Path) -> list[str]:
    """The safetensors of a folder without an index; `InputError` when there are none, or only pickles."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if found := sorted(p.name for p in folder.glob("*.safetensors")):
        return found
    if pickles := sorted(p.name for pattern in PICKLES for p in folder.glob(pattern)):
        raise InputError(
            f"{folder / pickles[0]}: weights in a pickle, which runs code when read; only safetensors are read. "
            f"Download the repository's *.safetensors"
        )
    raise InputError(f"{folder}: holds no *.safetensors")


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, each checked to lie within it without gap or overlap."""
    size = path.stat().st_size
    entries, begin = _header_entries(path, size)
    end = begin
    tensors = {}
    for name, entry in entries:
        tensors[name] = _stored(path, name, entry, begin=begin, expected=end)
        end = tensors[name].offset + _nbytes(tensors[name])
        if end > size:
            raise InputError(f"{path}: truncated: tensor {name} ends at {end}, the file at {size}")
    if end != size:
        raise InputError(f"{path}: {size - end} bytes behind the last tensor")
    return tensors


def _header_entries(path: Path, size: int) -> tuple[list[tuple[str, Any]], int]:
    """Name and description of each tensor in the order of the data, and where the data begins."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(8)
            if begin == LFS_POINTER[:8]:
                raise InputError(f"{path}: a pointer of Git LFS, not the file; `git lfs pull` fetches it")
            length = int.from_bytes(begin, "little")
            if size < 8 or length > min(size - 8, LONGEST_HEADER):
                raise InputError(f"{path}: truncated or no safetensors: {size} bytes, header of {length}")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return sorted(header.items(), key=lambda item: item[1]["data_offsets"]), 8 + length
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged header: {error!r}") from error


def _stored(path: Path, name: str, entry: Any, *, begin: int, expected: int) -> Stored:
    try:
        code, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if not all(isinstance(n, int) and n >= 0 for n in (*shape, start, stop)):
            raise ValueError("shape and data_offsets must be whole numbers")
        if not isinstance(code, str):
            raise ValueError("dtype must be a word")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: tensor {name}: damaged header: {error!r}") from error
    if code not in CODES:
        raise InputError(f"{path}: tensor {name} is {code}; supported are {', '.join(CODES)}")
    stored = Stored(path, CODES[code], shape, begin + start)
    if stop - start != _nbytes(stored):
        raise InputError(f"{path}: tensor {name} of shape {list(shape)} takes {stop - start} bytes")
    if begin + start != expected:
        raise InputError(
            f"{path}: tensor {name} begins at {begin + start}, not at {expected} behind the one before"
        )
    return stored


def _nbytes(stored: Stored) -> int:
    return prod(stored.shape) * ITEMSIZE[stored.dtype]


def shards(targets: Iterable[Target], *, limit: int) -> list[Unit]:
    """The targets, in order, as files of about equal size below `limit`, named as the hub names them."""
    targets = list(targets)
    total = sum(t.nbytes for t in targets)
    count = min(ceil(total / max(limit, 1)), len(targets))
    cuts: list[list[Target]] = [[] for _ in range(count)]
    for target, end in zip(targets, accumulate(t.nbytes for t in targets), strict=True):
        middle = end - target.nbytes // 2
        cuts[min(middle * count // total, count - 1)].append(target)
    cuts = [cut for cut in cuts if cut]
    names = [f"model-{i:05d}-of-{len(cuts):05d}.safetensors" for i in range(1, len(cuts) + 1)]
    return [file(name, cut) for name, cut in zip(names if len(cuts) > 1 else [SINGLE], cuts, strict=True)]


def file(name: str, targets: list[Target]) -> Unit:
    """One file with `targets` one behind the other."""
    ends = list(accumulate(t.nbytes for t in targets))
    first = len(header(targets))
    return Unit(name, tuple(targets), tuple(first + end for end in (0, *ends[:-1])))


def header(targets: Iterable[Target]) -> bytes:
    """The start of a safetensors file that holds `targets` one behind the other, data aligned to 8 bytes."""
    codes = {dtype: code for code, dtype in CODES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for target in targets:
        offsets = [end, end + target.nbytes]
        entries[target.name] = {
            "dtype": codes[target.dtype],
            "shape": list(target.sizes),
            "data_offsets": offsets,
        }
        end = offsets[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def frames(unit: Unit) -> list[tuple[int, bytes]]:
    """Place and bytes of what makes a file of the unit's targets."""
    return [(0, header(unit.targets))]


def index(units: Iterable[Unit]) -> str:
    """The text of `model.safetensors.index.json`."""
    units = list(units)
    weight_map = {t.name: unit.file for unit in units for t in unit.targets}
    total = sum(unit.nbytes for unit in units)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
    )


def revision(folder: Path) -> str | None:
    """The commit that a download came from, where huggingface_hub left word of it."""
    real = folder.resolve()
    if real.parent.name == "snapshots":  # its cache
        return real.name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"  # a download into a folder
    try:
        return note.read_text().split("\n", 1)[0]
    except OSError:
        return None


class HubRows:
    """A hub folder read by Megatron's names; what is stored is checked against the shape at once."""

    def __init__(self, folder: Path, shape: MixtralShape) -> None:
        self.hub, names = open_model(folder, shape)
        self._parts: dict[tuple[str, tuple[int, ...]], list[tuple[Rows, Rows]]] = {}
        for link in links(shape, names):
            self._parts.setdefault((link.megatron.name, link.megatron.index), []).append((link.megatron, link.hub))
        self._some = {name: parts[0][1].name for (name, _), parts in self._parts.items()}
        for (name, _), parts in self._parts.items():
            if other := [own.name for _, own in parts if self.hub.dtype(own.name) != self.dtype(name)]:
                raise InputError(f"{folder}: {other[0]} and {self._some[name]} differ in type; convert it first")

    def dtype(self, name: str) -> str:
        return self.hub.dtype(self._some[name])

    def row_bytes(self, name: str) -> int:
        return self.hub.row_bytes(self._some[name])

    def read(self, rows: Rows, out: memoryview) -> None:
        width = self.row_bytes(rows.name)
        for here, there in self._parts[rows.name, rows.index]:
            start, stop = max(rows.start, here.start), min(rows.stop, here.stop)
            if start < stop:
                shift = there.start - here.start
                part = Rows(there.name, there.index, start + shift, stop + shift)
                self.hub.read(part, out[(start - rows.start) * width : (stop - rows.start) * width])

    def file_of(self, rows: Rows) -> Path:
        parts = self._parts[rows.name, rows.index]
        return self.hub.file_of(next(there for here, there in parts if rows.start < here.stop))

    def fingerprint(self) -> dict[str, list[int]]:
        """Of every file read."""
        return self.hub.fingerprint()

    def apart(self) -> "HubRows":
        """A copy for another thread, with its own files."""
        mine = copy.copy(self)
        mine.hub = copy.copy(self.hub)
        mine.hub.files = Files()
        return mine
