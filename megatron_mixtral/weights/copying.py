"""Copies runs of rows from a source of tensors into one new file, and computes digests on the way, in little
memory.

A source reads rows. A unit says which rows make up a file, and their offsets in it.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.weights.tensors import ITEMSIZE, Rows

BLOCK = 1 << 20  # bytes read at a time: still in the processor's cache when they are digested and written
# The bits of an exponent that is all ones, which NaN and infinity have, one place to the left.
EXPONENT = {"bfloat16": 0xFF00, "float16": 0xF800, "float32": 0xFF00_0000}
BUFFERS = 8


class Source(Protocol):
    """Where tensors are read from, row by row."""

    def dtype(self, name: str) -> str:
        """One of ITEMSIZE."""

    def row_bytes(self, name: str) -> int:
        """Length of one row."""

    def read(self, rows: Rows, out: memoryview) -> None:
        """Fill `out` with the rows; `JobError` naming file and tensor if they can't be read."""

    def file_of(self, rows: Rows) -> Path:
        """The file that holds the rows, or the first of several."""


class WeightsFolder(Source, Protocol):
    """A source of all the weights of one model."""

    def fingerprint(self) -> dict[str, Any]:
        """Of every file read: the same as long as nobody changes one."""

    def apart(self) -> "WeightsFolder":
        """A copy for another thread, with its own files."""


def read_rows(source: Source, rows: Rows) -> memoryview:
    """The rows as they are stored, in memory of their own."""
    data = memoryview(bytearray(len(rows) * source.row_bytes(rows.name)))
    source.read(rows, data)
    return data


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows to read, the tensor whose digest they belong to, and the columns to write if not all."""

    rows: Rows
    digest: str
    columns: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """One contiguous block to write: a whole tensor, or the part of one that starts at `offsets`."""

    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    runs: tuple[RowRun, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.sizes) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class Unit:
    """One file of the output; a process writes it as a whole, and again after a kill."""

    file: str
    targets: tuple[Target, ...]
    places: tuple[int, ...]  # of each target's first byte in the file

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.targets)


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Rows that fit a buffer, their offset in the file, and the type to write."""

    run: RowRun
    rows: Rows
    place: int
    dtype: str


class Files:
    """Reads at offsets from many files, with few of them open.

    It doesn't map files into memory. If a mapped file is truncated or its network disk is lost, the process dies of
    SIGBUS, but a read can name the file. Mapped pages would also count as this process's memory.
    """

    LIMIT = 64

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def read(self, path: Path, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on."""
        try:
            done = 0
            while done < len(out):
                count = os.preadv(self._descriptor(path), [out[done:]], offset + done)
                if count == 0:
                    size = os.fstat(self._descriptor(path)).st_size
                    raise JobError(f"{path}: ends at {size}, {offset + len(out) - size} bytes short")
                done += count
        except OSError as error:
            raise JobError(f"{path}: {error.strerror} while reading at {offset}") from error

    def _descriptor(self, path: Path) -> int:
        if path not in self._open:
            if len(self._open) == self.LIMIT:
                oldest = next(iter(self._open))
                os.close(self._open.pop(oldest))
            self._open[path] = os.open(path, os.O_RDONLY)
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


class Copier:
    """Writes units: one thread reads and digests a block while it is in the cache, and another writes it.

    A third thread that reads ahead made it slower on two cores, because blocks then move between caches.
    """

    def __init__(self, source: Source, *, check_finite: bool = False, progress: Callable[[int], Any] = int) -> None:
        self.source, self.check_finite, self.progress = source, check_finite, progress
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._buffers = [memoryview(bytearray(BLOCK)) for _ in range(BUFFERS)]

    def write(self, unit: Unit, descriptor: int) -> dict[str, str]:
        """Write the unit's tensors to their offsets in an open file; returns digest's name -> BLAKE3."""
        digests: dict[str, Any] = {}
        writes: deque[Future[None]] = deque()
        try:
            for number, block in enumerate(self._blocks(unit)):
                if len(writes) == BUFFERS:  # the buffer may still be being written
                    writes.popleft().result()
                data = self._read(block, number % BUFFERS)
                writes.append(self._writer.submit(write_all, descriptor, data, block.place))
                digests.setdefault(block.run.digest, blake3()).update(data)
                self.progress(len(data))
        finally:  # after this returns, no thread may use file or buffers any more
            wait(writes)
        for write in writes:
            write.result()
        return {name: digest.hexdigest() for name, digest in digests.items()}

    def close(self) -> None:
        self._writer.shutdown()

    def _blocks(self, unit: Unit) -> Iterator[CopyBlock]:
        """Each run cut into rows that fit a buffer."""
        for target, first in zip(unit.targets, unit.places, strict=True):
            place = first
            for run in target.runs:
                name = run.rows.name
                stored, written = ITEMSIZE[self.source.dtype(name)], ITEMSIZE[target.dtype]
                width = self.source.row_bytes(name) // stored
                first, last = run.columns or (0, width)
                for rows in run.rows.cut(BLOCK // (width * max(stored, written))):
                    yield CopyBlock(run, rows, place, target.dtype)
                    place += len(rows) * (last - first) * written

    def _read(self, block: CopyBlock, number: int) -> memoryview:
        """The block's rows in the type to write: in buffer `number`, or in new memory if they were converted."""
        rows, dtype = block.rows, block.dtype
        length = len(rows) * self.source.row_bytes(rows.name)
        if length > len(self._buffers[number]):  # one row longer than a buffer
            self._buffers[number] = memoryview(bytearray(length))
        data = self._buffers[number][:length]
        try:
            self.source.read(rows, data)
        except JobError as error:
            error.args = (f"{error}; that is in tensor {rows.name}",)
            raise
        stored = self.source.dtype(rows.name)
        if block.run.columns:
            data = cut(data, len(rows), ITEMSIZE[stored], block.run.columns)
        if stored == dtype and not self.check_finite:
            return data
        name = f"{self.source.file_of(rows)}: tensor {rows.name}"
        return converted(data, stored, dtype, name=name, check_finite=self.check_finite)


def cut(data: memoryview, rows: int, item: int, columns: tuple[int, int]) -> memoryview:
    """Some columns of `rows` rows with elements of `item` bytes, row after row in new memory."""
    import numpy as np

    first, last = columns
    whole = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return np.ascontiguousarray(whole[:, first * item : last * item]).reshape(-1).data


def converted(data: memoryview, stored: str, dtype: str, *, name: str, check_finite: bool) -> memoryview:
    """`data` in another type; `InputError` if a value isn't finite in the old or the new type."""
    import torch

    before = torch.frombuffer(data, dtype=getattr(torch, stored))
    if check_finite and not all_finite(data, stored):
        raise InputError(f"{name}: holds NaN or infinity")
    if stored == dtype:
        return data
    after = before.to(getattr(torch, dtype))
    if dtype != "float32" and (torch.isinf(after) & torch.isfinite(before)).any():
        others = "bfloat16 or float32" if dtype == "float16" else "float32"
        largest = torch.finfo(after.dtype).max
        raise InputError(f"{name}: has values beyond {largest:g}, the largest of {dtype}; use {others}")
    return after.view(torch.uint8).numpy().data


def all_finite(data: memoryview, dtype: str) -> bool:
    """Whether no value is NaN or infinite: whether no exponent is all ones.

    torch's `isfinite` of half precision takes sixteen times as long on a CPU.
    """
    import numpy as np

    bits = np.frombuffer(data, f"<u{ITEMSIZE[dtype]}")
    unsigned = np.left_shift(bits, 1)  # drops the sign
    return not bits.size or int(unsigned.max()) < EXPONENT[dtype]


def digests(unit: Unit, path: Path) -> dict[str, str]:
    """Digest's name -> BLAKE3 of the unit's present file, read from the disk if possible."""
    found: dict[str, Any] = {}
    files, buffer = Files(), memoryview(bytearray(BLOCK))
    with path.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for target, first in zip(unit.targets, unit.places, strict=True):
        place, row_bytes = first, target.nbytes // sum(len(run.rows) for run in target.runs)
        for run in target.runs:
            end = place + len(run.rows) * row_bytes
            for start in range(place, end, BLOCK):
                data = buffer[: min(BLOCK, end - start)]
                files.read(path, start, data)
                found.setdefault(run.digest, blake3()).update(data)
            place = end
    files.close()
    return {name: digest.hexdigest() for name, digest in found.items()}


def around(path: Path, tensors: Iterable[tuple[int, int]] = ()) -> str:
    """BLAKE3 of a file's bytes outside its tensors, with the offset and length of each piece; tensors have their
    own digests.
    """
    found, end = blake3(), 0
    with path.open("rb") as stream:
        for place, length in (*sorted(tensors), (path.stat().st_size, 0)):
            stream.seek(end)
            while data := stream.read(min(BLOCK, max(0, place - end))):
                found.update(data)
                end += len(data)
            end = place + length
    return found.hexdigest()


def write_all(descriptor: int, data: memoryview | bytes, place: int) -> None:
    """pwrite until everything is written; `JobError` when the disk refuses."""
    view = memoryview(data)
    try:
        while view:
            count = os.pwrite(descriptor, view, place)
            view, place = view[count:], place + count
    except OSError as error:
        raise JobError(f"{os.readlink(f'/proc/self/fd/{descriptor}')}: {error.strerror}") from error
