"""Packs whole documents into sequences in which none sees another; a pure function of data, seed and number.

A document of n tokens takes n - 1 positions, because its last token is only predicted. A document longer than a
sequence is cut into parts that don't see each other. A part without learnt tokens, such as one of a long question,
is left out.
"""

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np

from megatron_mixtral.data.dataset import Documents, Sample
from megatron_mixtral.errors import InputError

Bin = list[int]  # pieces that share a sequence


class PackedSamples:
    """An endless sequence of samples over `chosen` documents; with `share=False` each document has its own
    sequence.
    """

    def __init__(
        self, documents: Documents, chosen: np.ndarray, sequence_length: int, seed: int, *, share: bool = True
    ) -> None:
        self._documents, self._seed, self._length, self._share = documents, seed, sequence_length, share
        self.tokens = int(documents.lengths[chosen].sum(dtype=np.int64))
        pieces = _pieces(chosen, documents.lengths[chosen], sequence_length)
        if not len(pieces[0]):
            raise InputError(
                f"{documents.prefix}: no document has two tokens or more, so there is nothing to predict"
            )
        self.cut = len(pieces[0]) - int((documents.lengths[chosen] > 1).sum())
        useful = _useful(documents, *pieces)
        self._document, self._begin, self._places = (part[useful] for part in pieces)
        self.left_out = int((~useful).sum())
        if not len(self._places):
            raise InputError(f"{documents.prefix}: there is nothing to learn in these {len(chosen)} documents")
        self._bins = lru_cache(maxsize=2)(self._packed)
        self.per_epoch = len(self._bins(0))

    @property
    def waste(self) -> float:
        """Share of an epoch's positions that are padding."""
        return 1 - int(self._places.sum(dtype=np.int64)) / (self.per_epoch * self._length)

    def _packed(self, epoch: int) -> list[Bin]:
        """The sequences of one epoch, in order; every epoch has the same number."""
        random = np.random.default_rng([self._seed, 1, epoch])
        order = random.permutation(len(self._places))
        if not self._share:
            return [[int(piece)] for piece in order]
        bins = best_fit(self._places[order], self._length)
        return [[int(order[i]) for i in bins[number]] for number in random.permutation(len(bins))]

    def sample(self, number: int) -> Sample:
        """Sample `number`; the padding at its end is a segment of its own that isn't learnt."""
        epoch, within = divmod(number, self.per_epoch)
        ids, labels, mask = np.zeros((3, self._length), dtype=np.int64)
        lengths, end = [], 0
        for piece in self._bins(epoch)[within]:
            begin, places = int(self._begin[piece]), int(self._places[piece])
            tokens, learnt = self._documents.read(int(self._document[piece]), begin, begin + places + 1)
            span = slice(end, end + places)
            ids[span], labels[span], mask[span] = tokens[:-1], tokens[1:], learnt[1:]
            lengths.append(places)
            end += places
        if end < self._length:
            lengths.append(self._length - end)
        return Sample(ids=ids, labels=labels, mask=mask, lengths=tuple(lengths))


def _pieces(chosen: np.ndarray, lengths: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every piece: its document, its begin within the document, and its number of positions."""
    places = np.maximum(lengths.astype(np.int64) - 1, 0)
    counts = -(-places // longest)
    first = np.cumsum(counts) - counts
    within = np.arange(counts.sum()) - np.repeat(first, counts)
    begin = within * longest
    return np.repeat(chosen, counts), begin, np.minimum(np.repeat(places, counts) - begin, longest)


def _useful(documents: Documents, document: np.ndarray, begin: np.ndarray, places: np.ndarray) -> np.ndarray:
    """For every piece, in order: whether it predicts any learnt token."""
    if documents.masks is None:
        return np.ones(len(places), dtype=bool)
    first = documents.starts[document] + begin + 1
    edges = np.stack([first, first + places], axis=1).ravel()
    inside = edges[:-1] if edges[-1] == len(documents.masks) else edges
    return np.maximum.reduceat(documents.masks, inside)[::2] > 0


def best_fit(sizes: np.ndarray, capacity: int) -> list[Bin]:
    """Bin packing of `sizes` into bins of `capacity`: the largest first, each into the fullest bin with room."""
    bins: list[Bin] = []
    rooms: list[int] = []  # the free sizes of open bins, sorted, each once
    with_room: dict[int, list[int]] = {}
    for piece in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[piece])
        found = bisect_left(rooms, size)
        if found == len(rooms):
            room, number = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[found]
            number = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[found]
        bins[number].append(piece)
        if left := room - size:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(number)
    return bins
