"""Copies runs of rows from a source of tensors into one new file, digesting them on the way, in little memory.

It knows neither format: a source reads rows, a unit says which rows make up which file and where in it they go.
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
BUFFERS = 8


class Source(Protocol):
    """Where tensors are read from, row by row."""

    def dtype(self, name: str) -> str:
        """One of ITEMSIZE."""

    def row_bytes(self, name: str) -> int:
        """Length of one row."""

    def read(self, rows: Rows, out: memoryview) -> None:
        """Fill `out` with the rows; `JobError` naming file and tensor when they can't be had."""

    def file_of(self, rows: Rows) -> Path:
        """Where they are read from, or the first of them."""


class WeightsFolder(Source, Protocol):
    """A source of all the weights of one model."""

    def fingerprint(self) -> dict[str, Any]:
        """Of every file read: the same as long as nobody changes one."""

    def apart(self) -> "WeightsFolder":
        """For another thread: with files of its own."""


def read_rows(source: Source, rows: Rows) -> memoryview:
    """The rows as they are stored, in memory of their own."""
    data = memoryview(bytearray(len(rows) * source.row_bytes(rows.name)))
    source.read(rows, data)
    return data


@dataclass(frozen=True, slots=True)
class RowRun:
    """Rows to read, the tensor in whose digest they count, and which of their columns to write if not all."""

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
    """One file of the output: what a process writes, or writes again, as a whole."""

    file: str
    targets: tuple[Target, ...]
    places: tuple[int, ...]  # of each target's first byte in the file

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.targets)


@dataclass(frozen=True, slots=True)
class CopyBlock:
    """Rows that fit a buffer, their place in the file, and the type to write."""

    run: RowRun
    rows: Rows
    place: int
    dtype: str


class Files:
    """Positioned reads from many files with few of them open.

    Reads rather than memory maps: a mapped file that is cut short or lost with its network disk kills the process
    (SIGBUS) where a read names the file, and mapped pages would count as this process's memory.
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
    """Writes units: one thread reads and digests what is then in its cache, another writes.

    A third that reads ahead made it slower where measured (two cores): the blocks then wander between caches.
    """

    def __init__(self, source: Source, *, check_finite: bool = False, progress: Callable[[int], Any] = int) -> None:
        self.source, self.check_finite, self.progress = source, check_finite, progress
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._buffers = [memoryview(bytearray(BLOCK)) for _ in range(BUFFERS)]

    def write(self, unit: Unit, descriptor: int) -> dict[str, str]:
        """Write the unit's tensors to their places in an open file; digest's name -> BLAKE3 of what was written."""
        digests: dict[str, Any] = {}
        writes: deque[Future[None]] = deque()
        try:
            for number, block in enumerate(self._blocks(unit)):
                if len(writes) == BUFFERS:  # the buffer may still be on its way to the file
                    writes.popleft().result()
                data = self._read(block, number % BUFFERS)
                writes.append(self._writer.submit(write_all, descriptor, data, block.place))
                digests.setdefault(block.run.digest, blake3()).update(data)
                self.progress(len(data))
        finally:  # whatever happened, nobody may use file or buffers any more once this returns
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
        """The block's rows in the type to write, in buffer `number` or, converted, in memory of their own."""
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
    """Some columns of `rows` rows of elements of `item` bytes, one row behind the other in memory of their own."""
    import numpy as np

    first, last = columns
    whole = np.frombuffer(data, np.uint8).reshape(rows, -1)
    return np.ascontiguousarray(whole[:, first * item : last * item]).reshape(-1).data


def converted(data: memoryview, stored: str, dtype: str, *, name: str, check_finite: bool) -> memoryview:
    """`data` in another type; `InputError` when a value isn't finite, or no longer is in the new type."""
    import torch

    before = torch.frombuffer(data, dtype=getattr(torch, stored))
    if check_finite and not torch.isfinite(before).all():
        raise InputError(f"{name}: holds NaN or infinity")
    if stored == dtype:
        return data
    after = before.to(getattr(torch, dtype))
    if dtype != "float32" and (torch.isinf(after) & torch.isfinite(before)).any():
        others = "bfloat16 or float32" if dtype == "float16" else "float32"
        largest = torch.finfo(after.dtype).max
        raise InputError(f"{name}: has values beyond {largest:g}, the largest of {dtype}; use {others}")
    return after.view(torch.uint8).numpy().data


def digests(unit: Unit, path: Path) -> dict[str, str]:
    """Digest's name -> BLAKE3 of the unit's file as it is now, read from the disk where that can be."""
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
    """BLAKE3 of all of a file but its tensors' bytes, which have digests of their own; of each place and length."""
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
