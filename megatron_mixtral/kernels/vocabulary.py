"""The two ends of the model where the vocabulary is cut over ranks: a token's embedding and its likeliest follower.

Shapes: T tokens, R requests, V words of this rank, the first of them number `first`.
"""

import triton
import triton.language as tl
from torch import Tensor

from megatron_mixtral.kernels.peer_words import Inboxes, packed, receive, send


@triton.jit
def _look_up(ids, stride, drawn, words, out, first, count, width, N: tl.constexpr):  # noqa: ANN001, ANN202
    token = tl.program_id(0).to(tl.int64)
    word = tl.load(ids + token * stride).to(tl.int64)
    if word < 0:
        word = tl.load(drawn - 1 - word).to(tl.int64)
    word -= first
    at = tl.arange(0, N)
    mask = at < width
    here = (word >= 0) & (word < count)
    value = tl.load(words + word * width + at, mask=mask & here, other=0.0)
    tl.store(out + token * width + at, value, mask=mask)


def look_up(ids: Tensor, drawn: Tensor, words: Tensor, out: Tensor, first: int = 0) -> Tensor:
    """ids [T] int32, words [V, H] -> out [T, H], 0 where a word is another rank's.

    The id -1 - s stands for the token that was drawn last in slot s; drawn [slots] int32.
    """
    count, width = words.shape
    block = triton.next_power_of_2(width)
    _look_up[(len(ids),)](ids, ids.stride(0), drawn, words, out, first, count, width, N=block, num_warps=4)
    return out


@triton.jit
def _likeliest(  # noqa: ANN202
    logits, slots, drawn, tokens, first, width, limit, addresses, calls, most,  # noqa: ANN001
    RANK: tl.constexpr, RANKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of the largest logits, over all ranks; limit: words there are, the rest fill up."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    where = tl.full([BLOCK], 0, tl.int32)
    for start in range(0, width, BLOCK):
        mask = (start + at < width) & (first + start + at < limit)
        value = tl.load(logits + row * width + start + at, mask=mask, other=float("-inf")).to(tl.float32)
        better = value > largest
        largest = tl.where(better, value, largest)
        where = tl.where(better, start + at, where)
    best = tl.max(largest)
    word = first + tl.min(tl.where(largest == best, where, 2**30))
    word = tl.where(best == best, word, 0)  # of NaN some token is taken
    if RANKS > 1:
        call = tl.load(calls + row) + 1
        place = (call & 1).to(tl.int64) * RANKS * most * 2 + row * 2
        pair = tl.arange(0, 2)
        bits = tl.where(pair == 0, best.to(tl.int32, bitcast=True), word.to(tl.int32))
        send(addresses, place + RANK * most * 2 + pair, packed(bits, call), pair < 2, RANK, RANKS)
        for rank in tl.static_range(RANKS):
            if rank != RANK:
                got = receive(addresses, place + rank * most * 2 + pair, pair < 2, call, RANK).to(tl.int32)
                other = tl.sum(tl.where(pair == 0, got, 0)).to(tl.float32, bitcast=True)
                its = tl.sum(tl.where(pair == 1, got, 0))
                better = (other > best) | ((other == best) & (its < word))
                best = tl.where(better, other, best)
                word = tl.where(better, its, word)
        tl.store(calls + row, call)
    tl.store(tokens + row, word.to(tl.int32))
    slot = tl.load(slots + row)
    if slot >= 0:
        tl.store(drawn + slot, word.to(tl.int32))


def likeliest(
    logits: Tensor, slots: Tensor, drawn: Tensor, tokens: Tensor, *, limit: int, first: int = 0,
    inboxes: Inboxes | None = None,
) -> None:  # fmt: skip
    """logits [R, V] -> tokens [R] int32, and to its slot of `drawn`; a row's slot may be none, -1.

    With `inboxes` of two words, of the whole vocabulary of all ranks; else of this rank's words alone.
    """
    rows, width = logits.shape
    box = (None, None, 0) if inboxes is None else (inboxes.addresses, inboxes.calls, inboxes.rows)
    rank, ranks = (0, 1) if inboxes is None else (inboxes.rank, inboxes.ranks)
    _likeliest[(rows,)](
        logits, slots, drawn, tokens, first, width, limit, *box, RANK=rank, RANKS=ranks, BLOCK=4096, num_warps=8
    )  # fmt: skip
