"""Routing for the server: each token's experts, and rows sorted by expert, without copying counts to the host.

Shapes: T tokens, k experts a token, R = T k rows, E experts, H hidden.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Each token's experts, in order of experts, and their weights."""

    experts: Tensor  # [T, k] int32; -1 for padding tokens
    probs: Tensor  # [T, k]


@dataclass(frozen=True, kw_only=True)
class Order:
    """Rows sorted by expert; padding rows are at the end."""

    source: Tensor  # [R] int32: each row's index in `Choice`
    place: Tensor  # [T, k] int32: the row of each index; -1: none
    ends: Tensor  # [E] int32: where each expert's rows end


@triton.jit
def _choose(x, weight, real, share, chosen, probs, width, E: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """The K largest logits of a token and their softmax; logits rounded to the model's type, as when trained."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    expert = tl.arange(0, E)
    logits = tl.zeros([E], tl.float32)
    for start in range(0, width, BLOCK):
        mask = start + at < width
        value = tl.load(x + token * width + start + at, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(weight + expert[:, None] * width + (start + at)[None, :], mask=mask[None, :], other=0.0)
        logits += tl.sum(w.to(tl.float32) * value[None, :], 1)
    logits = logits.to(x.dtype.element_ty).to(tl.float32)
    top = tl.max(logits)
    total = 0.0
    left = tl.where(logits > float("-inf"), logits, -3e38)  # K different experts are chosen even for NaN
    picked = tl.zeros([E], tl.int32)
    for _ in tl.static_range(K):
        best = tl.argmax(left, 0)
        total += tl.exp(tl.max(left) - top)
        picked = tl.where(expert == best, 1, picked)
        left = tl.where(expert == best, float("-inf"), left)
    counts = token % share < tl.load(real + token // share)
    rank = tl.cumsum(picked) - 1  # the expert's index among the token's experts, in order of experts
    at_own = token * K + rank
    tl.store(chosen + at_own, tl.where(counts, expert, -1), mask=picked > 0)
    tl.store(probs + at_own, (tl.exp(logits - top) / total).to(probs.dtype.element_ty), mask=picked > 0)


@triton.jit
def _sort(chosen, source, place, ends, rows, first, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """One program for each expert: it counts the rows of earlier experts, then numbers its own."""
    expert = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    before, own = 0, 0
    for start in range(0, rows, BLOCK):
        value = tl.load(chosen + start + at, mask=start + at < rows, other=-1) - first
        before += tl.sum(((value >= 0) & (value < expert)).to(tl.int32))
        own += tl.sum((value == expert).to(tl.int32))
    tl.store(ends + expert, before + own)
    for start in range(0, rows, BLOCK):
        inside = start + at < rows
        value = tl.load(chosen + start + at, mask=inside, other=-1) - first
        mine = inside & (value == expert)
        row = before + tl.cumsum(mine.to(tl.int32)) - 1
        tl.store(source + row, start + at, mask=mine)
        nobodys = (value < 0) | (value >= tl.num_programs(0))
        tl.store(place + start + at, tl.where(mine, row, -1), mask=inside & (mine | (nobodys & (expert == 0))))
        before += tl.sum(mine.to(tl.int32))


@triton.jit
def _spread(x, probs, source, ends, rows, row_probs, width, K: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(ends + E - 1):
        own = tl.load(source + row)
        at = tl.arange(0, BLOCK)
        value = tl.load(x + (own // K).to(tl.int64) * width + at, mask=at < width, other=0.0)
        tl.store(rows + row * width + at, value, mask=at < width)
        tl.store(row_probs + row, tl.load(probs + own))


def choose(x: Tensor, router: Tensor, top_k: int, real: Tensor) -> Choice:
    """x [T, H], router [E, H]; E is a power of two. `real` [1] int32: how many tokens count.

    Or `real` [n], where the tokens are n equal shares one after another: how many of each count.
    """
    tokens, width = x.shape
    experts = torch.empty(tokens, top_k, dtype=torch.int32, device=x.device)
    probs = x.new_empty(tokens, top_k)
    _choose[(tokens,)](
        x, router, real, tokens // len(real), experts, probs, width, E=router.shape[0], K=top_k,
        BLOCK=4096 if tokens <= 16 else 2048,         num_warps=16 if tokens <= 16 else 8,
    )  # fmt: skip
    return Choice(experts=experts, probs=probs)


def sort(choice: Choice, count: int, first: int = 0) -> Order:
    """The rows of `count` experts from `first` on, each one's in the order of tokens; others' are nobody's."""
    rows = choice.experts.numel()
    source, place = torch.empty_like(choice.experts).view(-1), torch.empty_like(choice.experts)
    ends = torch.empty(count, dtype=torch.int32, device=source.device)
    block = min(triton.next_power_of_2(rows), 2048)
    _sort[(count,)](choice.experts, source, place, ends, rows, first, BLOCK=block, num_warps=4)
    return Order(source=source, place=place, ends=ends)


def spread(x: Tensor, choice: Choice, order: Order) -> tuple[Tensor, Tensor]:
    """x [T, H] -> its rows [R, H] and their weights [R]; padding rows are undefined."""
    (tokens, width), top_k = x.shape, choice.experts.shape[1]
    rows, probs = x.new_empty(tokens * top_k, width), choice.probs.new_empty(tokens * top_k)
    block = triton.next_power_of_2(width)
    _spread[(len(rows),)](
        x, choice.probs, order.source, order.ends, rows, probs, width, K=top_k, E=len(order.ends), BLOCK=block,
        num_warps=min(max(block // 1024, 1), 8),
    )  # fmt: skip
    return rows, probs
