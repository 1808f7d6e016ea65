"""Chooses the tokens of a step: a pure function of data, seed and sample number, independent of layout and history.

Sample i of an epoch is `sequence_length + 1` tokens of the epoch's shuffled documents laid end to end; resuming
at sample n reads nothing of the n before it.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_mixtral.errors import InputError


class Documents:
    """The documents at a `.bin/.idx` prefix with their loss mask (all ones when there is no mask file)."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.tokens, self.lengths, self.starts = _mapped(prefix)
        self.masks: np.ndarray | None = None
        mask = Path(f"{prefix}_mask")
        if mask.with_name(mask.name + ".idx").exists():
            self.masks, lengths, _ = _mapped(mask)
            if not np.array_equal(lengths, self.lengths):
                raise InputError(f"{mask}.idx: its documents differ from those of {prefix}.idx")

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, index: int, begin: int, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Ids (int64) and mask (0/1, int64) of tokens begin <= t < end of one document."""
        start = int(self.starts[index])
        span = slice(start + begin, start + (int(self.lengths[index]) if end is None else end))
        ids = self.tokens[span].astype(np.int64)
        return ids, np.ones_like(ids) if self.masks is None else self.masks[span].astype(np.int64)


def _mapped(prefix: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (memory-mapped), lengths and starts in tokens; `InputError` names a damaged file."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (idx, data):
        if not file.is_file():
            raise InputError(f"{file}: no such file; `prepare` writes it")
    with idx.open("rb") as stream:
        raw = stream.read(34)
    kinds = {1: np.uint8, 4: np.int32, 5: np.int64, 8: np.uint16}
    kind = kinds.get(raw[17]) if len(raw) == 34 and raw[:9] == b"MMIDIDX\x00\x00" else None
    if kind is None:
        raise InputError(f"{idx}: not an index of tokens")
    count = int.from_bytes(raw[18:26], "little")
    lengths = np.fromfile(idx, dtype=np.int32, offset=34, count=count)
    if len(lengths) != count or (lengths < 0).any():
        raise InputError(f"{idx}: damaged: it doesn't have a length for each of its {count} documents")
    size = np.dtype(kind).itemsize
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    if int(lengths.sum(dtype=np.int64)) * size != data.stat().st_size:
        raise InputError(f"{data}: {data.stat().st_size} bytes, but {idx} counts {int(lengths.sum()) * size}")
    if not count or not lengths.any():
        raise InputError(f"{data}: no tokens in it")
    return np.memmap(data, dtype=kind, mode="r"), lengths, starts


@dataclass(frozen=True, kw_only=True)
class Split:
    """Document numbers of one side of the split."""

    train: np.ndarray
    validation: np.ndarray


def split(count: int, validation: float, seed: int) -> Split:
    """Choose whole documents for validation: at least one unless the share is 0, and never all."""
    order = np.random.default_rng([seed, 0]).permutation(count)
    held = min(max(round(count * validation), 1), count - 1) if validation else 0
    return Split(train=np.sort(order[held:]), validation=np.sort(order[:held]))


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence of S tokens, each array [S]: the input, the labels, and the loss mask.

    `lengths` adds up to S: segments that don't see each other.
    """

    ids: np.ndarray
    labels: np.ndarray
    mask: np.ndarray
    lengths: tuple[int, ...]


class Samples:
    """An endless sequence of samples over `chosen` documents; `samples[i]` depends on nothing but its arguments.

    The last tokens of an epoch, too few for a sample, are left out. With `pad` they are padded to a sample instead,
    so a few documents are enough for validation.
    """

    def __init__(
        self, documents: Documents, chosen: np.ndarray, sequence_length: int, seed: int, *, pad: bool = False
    ) -> None:
        self._documents, self._chosen, self._seed = documents, chosen, seed
        self._length = sequence_length
        self.tokens = int(documents.lengths[chosen].sum(dtype=np.int64))
        self.per_epoch = -((1 - self.tokens) // sequence_length) if pad else (self.tokens - 1) // sequence_length
        if self.per_epoch < 1:
            raise InputError(
                f"{documents.prefix}: {self.tokens} tokens in {len(chosen)} documents are less than one sequence "
                f"of {sequence_length}; give more data or a shorter sequence_length"
            )
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One epoch: the shuffled documents, where each begins in the stream, and the shuffled samples."""
        random = np.random.default_rng([self._seed, 1, epoch])
        order = self._chosen[random.permutation(len(self._chosen))]
        lengths = self._documents.lengths[order].astype(np.int64)
        return order, np.cumsum(lengths) - lengths, random.permutation(self.per_epoch)

    def sample(self, number: int) -> Sample:
        """Sample `number`; each token sees all tokens before it."""
        ids, mask = self[number]
        return Sample(ids=ids[:-1], labels=ids[1:], mask=mask[1:], lengths=(self._length,))

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and mask, each of sequence_length + 1; the mask tells which ids are predicted."""
        epoch, within = divmod(number, self.per_epoch)
        order, starts, shuffled = self._order(epoch)
        begin = int(shuffled[within]) * self._length
        end = min(begin + self._length + 1, self.tokens)
        first = int(np.searchsorted(starts, begin, side="right")) - 1
        ids, mask = np.zeros((2, self._length + 1), dtype=np.int64)
        for place in range(first, len(order)):
            start, length = int(starts[place]), int(self._documents.lengths[order[place]])
            if start >= end:
                break
            inside = max(begin - start, 0), min(end - start, length)
            span = slice(start + inside[0] - begin, start + inside[1] - begin)
            ids[span], mask[span] = self._documents.read(order[place], *inside)
        return ids, mask


def numbers(first: int, *, global_batch: int, micro_batch: int, rank: int, replicas: int) -> list[list[int]]:
    """Sample numbers of a step that begins at sample `first`, for data-parallel rank `rank`: a list for each micro
    batch.

    A micro batch has the same samples for any number of replicas; only the replica that computes it changes.
    """
    rounds = global_batch // (micro_batch * replicas)
    starts = [first + (m * replicas + rank) * micro_batch for m in range(rounds)]
    return [list(range(start, start + micro_batch)) for start in starts]
