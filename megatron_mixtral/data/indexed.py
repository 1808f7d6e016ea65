"""Writes Megatron's `.bin`/`.idx` as a stream; the files are complete or don't exist.

Byte for byte what megatron-core's IndexedDatasetBuilder writes for one sequence a document, without its Python
loop over sequences and without importing torch; megatron-core's IndexedDataset reads it.
"""

import os
import struct
from pathlib import Path

import numpy as np

# Megatron's own numbering of element types.
CODES = {np.dtype(np.uint8): 1, np.dtype(np.int32): 4, np.dtype(np.uint16): 8}


def token_dtype(vocab_size: int) -> np.dtype:
    """The element type upstream chooses for this vocabulary, so that its tools read the file as their own."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, lengths: np.ndarray, dtype: np.dtype) -> None:
    """`path` (.idx) for documents of `lengths` tokens (int32) that lie one after another in the .bin."""
    count = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64)
    with path.open("wb") as stream:
        stream.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], count, count + 1))
        stream.write(np.ascontiguousarray(lengths, dtype=np.int32).tobytes())
        starts = np.zeros(count, dtype=np.int64)
        starts[1:] = ends[:-1] * dtype.itemsize
        stream.write(starts.tobytes())
        stream.write(np.arange(count + 1, dtype=np.int64).tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def join(parts: list[Path], target: Path) -> None:
    """Concatenate `parts` into `target`, in the kernel where it can, durable before it returns."""
    with target.open("wb") as out:
        for part in parts:
            with part.open("rb") as stream:
                left = part.stat().st_size
                while left:
                    left -= os.sendfile(out.fileno(), stream.fileno(), None, left)
        os.fsync(out.fileno())
