"""What several ranks add to the residual, summed over them, and the norm that follows: one kernel over memory.

A few tokens go as words, which takes the shortest time; more of them as they are with a flag each, which takes half
the bytes. Every rank adds the parts in the order of ranks, each rounded to the model's type, so all have the same
residual. Shapes: T tokens, H hidden.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mixtral.kernels.peer_words import Inboxes, packed, packed_pair, receive, send
from megatron_mixtral.kernels.small_batch import Rows


def words(width: int, dtype: torch.dtype) -> int:
    """Of a token that goes as words."""
    return width // 2 if dtype.itemsize == 2 else width


def words_with_flag(width: int, dtype: torch.dtype) -> int:
    """Of a token that goes as it is, its flag among them."""
    return width * dtype.itemsize // 8 + 1


@triton.jit
def _gathered(  # noqa: ANN202
    delta, parts, place, rows, token, at, mask, width,  # noqa: ANN001
    K: tl.constexpr, PARTS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """What this rank adds to some columns of a token."""
    value = tl.zeros([N], tl.float32)
    if K == 0:
        value += tl.load(delta + token * width + at, mask=mask, other=0.0).to(tl.float32)
    else:
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k).to(tl.int64)
            for part in tl.static_range(PARTS):
                value += tl.load(parts + (part * rows + row) * width + at, mask=mask & (row >= 0), other=0.0).to(
                    tl.float32
                )
    return value


@triton.jit
def _add_and_norm(  # noqa: ANN202
    residual, delta, parts, place, weight, out, rows, width, eps, addresses, calls, most,  # noqa: ANN001
    K: tl.constexpr, PARTS: tl.constexpr, PAIRS: tl.constexpr,
    RANK: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A token's columns are handled in two halves, of which a word of PAIRS holds one number each."""
    token = tl.program_id(0).to(tl.int64)
    half = width // 2
    at = tl.arange(0, N)
    mask = at < half
    dtype = residual.dtype.element_ty
    low = _gathered(delta, parts, place, rows, token, at, mask, width, K, PARTS, N).to(dtype)
    high = _gathered(delta, parts, place, rows, token, at + half, mask, width, K, PARTS, N).to(dtype)
    call = tl.load(calls + token) + 1
    here = half if PAIRS else width  # words of a token
    first = (call & 1).to(tl.int64) * RANKS * most * here + token * here + at
    to = first + RANK * most * here
    if PAIRS:
        send(addresses, to, packed_pair(low, high, call), mask, RANK, RANKS)
    else:
        send(addresses, to, packed(low, call), mask, RANK, RANKS)
        send(addresses, to + half, packed(high, call), mask, RANK, RANKS)
    below = tl.zeros([N], tl.float32)
    above = tl.zeros([N], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            below += low.to(tl.float32)
            above += high.to(tl.float32)
        elif PAIRS:
            got = receive(addresses, first + rank * most * here, mask, call, RANK)
            below += (got & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
            above += ((got >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)
        else:
            got = receive(addresses, first + rank * most * here, mask, call, RANK)
            below += got.to(tl.int32).to(tl.float32, bitcast=True)
            got = receive(addresses, first + rank * most * here + half, mask, call, RANK)
            above += got.to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(calls + token, call)
    own = residual + token * width + at
    below += tl.load(own, mask=mask, other=0.0).to(tl.float32)
    above += tl.load(own + half, mask=mask, other=0.0).to(tl.float32)
    low, high = below.to(dtype), above.to(dtype)
    tl.store(own, low, mask=mask)
    tl.store(own + half, high, mask=mask)
    if weight is not None:
        below, above = low.to(tl.float32), high.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(below * below + above * above) / width + eps)
        below *= inverse * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        above *= inverse * tl.load(weight + half + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + token * width + at, below.to(dtype), mask=mask)
        tl.store(out + token * width + half + at, above.to(dtype), mask=mask)


@triton.jit
def _add_and_norm_by_flags(  # noqa: ANN202
    residual, delta, parts, place, weight, out, rows, width, eps, addresses, calls, most,  # noqa: ANN001
    K: tl.constexpr, PARTS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """An inbox holds a flag of 32 bits for each rank's tokens, the count of the call, and then the tokens."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, N)
    mask = at < width
    dtype = residual.dtype.element_ty
    value = _gathered(delta, parts, place, rows, token, at, mask, width, K, PARTS, N).to(dtype)
    call = tl.load(calls + token) + 1
    half = (call & 1).to(tl.int64) * RANKS
    flags = RANKS * most
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            its = tl.load(addresses + peer).to(tl.pointer_type(tl.int32))
            there = (its + flags).to(tl.pointer_type(dtype)) + ((half + RANK) * most + token) * width
            tl.store(there + at, value, mask=mask)
    tl.debug_barrier()  # all is on its way before the flag is
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            its = tl.load(addresses + peer).to(tl.pointer_type(tl.int32))
            tl.atomic_xchg(its + RANK * most + token, call, sem="release", scope="sys")
    own = tl.load(addresses + RANK).to(tl.pointer_type(tl.int32))
    total = tl.zeros([N], tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            total += value.to(tl.float32)
        else:
            seen = tl.load(own + rank * most + token, volatile=True)
            while seen - call < 0:  # a peer may be a call ahead
                seen = tl.load(own + rank * most + token, volatile=True)
            tl.atomic_add(own + rank * most + token, 0, sem="acquire", scope="sys")
            tl.debug_barrier()
            here = (own + flags).to(tl.pointer_type(dtype)) + ((half + rank) * most + token) * width
            total += tl.load(here + at, mask=mask, other=0.0, volatile=True).to(tl.float32)
    tl.store(calls + token, call)
    total += tl.load(residual + token * width + at, mask=mask, other=0.0).to(tl.float32)
    rounded = total.to(dtype)
    tl.store(residual + token * width + at, rounded, mask=mask)
    if weight is not None:
        total = rounded.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(total * total) / width + eps)
        total *= inverse * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + token * width + at, total.to(dtype), mask=mask)


def add_and_norm(
    residual: Tensor,
    added: Tensor | Rows,
    weight: Tensor | None,
    eps: float,
    peers: Inboxes,
    *,
    flags: bool = False,
) -> Tensor:
    """As `small_batch.add_and_norm`, of the sum over ranks of `added`; H is even, T at most the peers' rows.

    With `flags` they have room for `words_with_flag`, else for `words`.
    """
    tokens, width = residual.shape
    out = residual if weight is None else torch.empty_like(residual)
    delta, parts, place = (None, added.parts, added.place) if isinstance(added, Rows) else (added, None, None)
    count, rows = (0, 0) if parts is None else parts.shape[:2]
    call = (residual, delta, parts, place, weight, out, rows, width, eps, peers.addresses, peers.calls, peers.rows)
    sizes = {"K": 0 if place is None else place.shape[1], "PARTS": count, "RANK": peers.rank, "RANKS": peers.ranks}
    sizes["num_warps"] = 8 if width >= 2048 else 4
    if flags:
        _add_and_norm_by_flags[(tokens,)](*call, **sizes, N=triton.next_power_of_2(width))
    else:
        half = triton.next_power_of_2(width // 2)
        _add_and_norm[(tokens,)](*call, **sizes, PAIRS=residual.dtype.itemsize == 2, N=half)
    return out
