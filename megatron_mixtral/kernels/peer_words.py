"""Memory of ranks that their peers reach, and numbers in it that say themselves when all of them are there.

A word of 64 bits holds a number, or two of 16 bits, below the count of the call: no flag is set, no fence needed.
Each call takes the other of two places, so what a slow peer still reads isn't written over. All ranks make the same
calls. Shapes: W ranks.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Inboxes:
    """Memory of every rank that all others can write to, [2, W, rows, words] int64 each, zero at first."""

    addresses: Tensor  # [W] int64: where each rank's begins
    calls: Tensor  # [rows] int32: how often a row has been exchanged
    memory: Tensor  # this rank's own
    rank: int
    ranks: int
    rows: int


@triton.jit
def packed(value, call):  # noqa: ANN001, ANN201
    """fp32 or int32 -> a word."""
    return (call.to(tl.int64) << 32) | (value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def packed_pair(low, high, call):  # noqa: ANN001, ANN201
    """Two of 16 bits -> a word."""
    below = low.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    above = high.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF
    return (call.to(tl.int64) << 32) | (above << 16) | below


@triton.jit
def send(addresses, place, word, mask, RANK: tl.constexpr, RANKS: tl.constexpr):  # noqa: ANN001, ANN201
    """`word` to the same `place` of all others."""
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            box = tl.load(addresses + peer).to(tl.pointer_type(tl.int64))
            tl.store(box + place, word, mask=mask)


@triton.jit
def receive(addresses, place, mask, call, RANK: tl.constexpr):  # noqa: ANN001, ANN201
    """The words of this call, once they are all there."""
    box = tl.load(addresses + RANK).to(tl.pointer_type(tl.int64))
    got = tl.load(box + place, mask=mask, other=0, volatile=True)
    missing = tl.max(((got >> 32 != call.to(tl.int64)) & mask).to(tl.int32))
    while missing > 0:
        got = tl.load(box + place, mask=mask, other=0, volatile=True)
        missing = tl.max(((got >> 32 != call.to(tl.int64)) & mask).to(tl.int32))
    return got
