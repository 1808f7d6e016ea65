"""Several data sets as one, each drawn from by its weight; whose sample n is follows from the weights and n alone.

Sample k of a part is due at (k + 1/2) / weight, and the blend takes them as they are due: any stretch of it holds
every part's share to within about a sample, and to find sample n nothing before it is read.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from megatron_mixtral.data.dataset import Sample, Samples
from megatron_mixtral.data.packing import PackedSamples

BLOCK = 1 << 12  # samples whose parts are found at a time


class Blend:
    """An endless sequence of samples of `parts`, drawn by `weights` of any sum."""

    def __init__(self, parts: Sequence["Samples | PackedSamples | Blend"], weights: Sequence[float]) -> None:
        self._parts = parts
        self.shares = np.array(weights) / math.fsum(weights)
        self.tokens: int = sum(part.tokens for part in parts)
        self.per_epoch: int = sum(part.per_epoch for part in parts)
        self._block = lru_cache(maxsize=2)(self._drawn)

    def sample(self, number: int) -> Sample:
        """Sample `number`."""
        block, within = divmod(number, BLOCK)
        part, own = self._block(block)
        return self._parts[int(part[within])].sample(int(own[within]))

    def _drawn(self, block: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Of every sample of a block: its part, and its number within that part."""
        first, slack = block * BLOCK, len(self._parts)
        begin = np.maximum(np.ceil((first - slack) * self.shares - 0.5), 0).astype(np.int64)
        end = np.ceil((first + BLOCK + slack) * self.shares + 0.5).astype(np.int64)
        part = np.repeat(np.arange(slack), end - begin)
        own = np.concatenate([np.arange(b, e) for b, e in zip(begin, end, strict=True)])
        due = np.lexsort((part, (own + 0.5) / self.shares[part]))
        chosen = due[first - int(begin.sum()) :][:BLOCK]
        return part[chosen], own[chosen]
