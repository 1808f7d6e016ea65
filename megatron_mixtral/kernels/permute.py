"""Permutes tokens to the rows of their experts and back; all counts and indices stay on the device.

Shapes: T tokens, E experts, R = rows of all experts (T times the experts per token), H hidden.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Each token's rows: `place[t, e]` is its row in expert e, or -1 if it isn't sent there."""

    place: Tensor  # [T, E] int32
    counts: Tensor  # [E] int32, rows of each expert
    rows: int


@triton.jit
def _place(chosen, place, counts, tokens, E: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """One program for each expert: it counts the rows of earlier experts, then numbers its own."""
    expert = tl.program_id(0)
    column = tl.arange(0, WIDE)
    row = tl.arange(0, BLOCK)
    sums = tl.zeros([WIDE], dtype=tl.int32)
    for start in range(0, tokens, BLOCK):
        at = start + row
        inside = (at < tokens)[:, None] & (column < E)[None, :]
        sums += tl.sum(tl.load(chosen + at[:, None] * E + column[None, :], mask=inside, other=0).to(tl.int32), 0)
    next_row = tl.sum(tl.where(column < expert, sums, 0))
    tl.store(counts + expert, tl.sum(tl.where(column == expert, sums, 0)))
    for start in range(0, tokens, BLOCK):
        at = start + row
        mine = tl.load(chosen + at * E + expert, mask=at < tokens, other=0).to(tl.int32)
        number = next_row + tl.cumsum(mine) - 1
        tl.store(place + at * E + expert, tl.where(mine > 0, number, -1), mask=at < tokens)
        next_row += tl.sum(mine)


def plan(chosen: Tensor, top_k: int) -> Plan:
    """From chosen [T, E] (bool, `top_k` true in each row); rows lie expert by expert, tokens in order."""
    tokens, experts = chosen.shape
    place = torch.empty(tokens, experts, dtype=torch.int32, device=chosen.device)
    counts = torch.empty(experts, dtype=torch.int32, device=chosen.device)
    wide = triton.next_power_of_2(experts)
    chosen = chosen.contiguous().view(torch.uint8)
    _place[(experts,)](chosen, place, counts, tokens, experts, WIDE=wide, BLOCK=1024, num_warps=8)
    return Plan(place=place, counts=counts, rows=tokens * top_k)


@triton.jit
def _spread(tokens, probs, place, rows, row_probs, E: tl.constexpr, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """Copy each token to all its rows, and its probabilities to theirs."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(tokens + token * width + at, mask=mask, other=0.0)
    for e in tl.static_range(E):
        row = tl.load(place + token * E + e).to(tl.int64)
        if row >= 0:
            tl.store(rows + row * width + at, value, mask=mask)
            if row_probs is not None:
                tl.store(row_probs + row, tl.load(probs + token * E + e))


@triton.jit
def _gather(rows, row_probs, place, tokens, probs, E: tl.constexpr, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """Sum each token's rows; copy the rows' probabilities to their entries, 0 elsewhere."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for e in tl.static_range(E):
        row = tl.load(place + token * E + e).to(tl.int64)
        if row >= 0:
            total += tl.load(rows + row * width + at, mask=mask, other=0.0).to(tl.float32)
        if probs is not None:
            own = tl.load(row_probs + row, mask=row >= 0, other=0.0)
            tl.store(probs + token * E + e, own)
    tl.store(tokens + token * width + at, total.to(tokens.dtype.element_ty), mask=mask)


def _sizes(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 1024, 1), 8)}


def spread(tokens: Tensor, probs: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """tokens [T, H], probs [T, E] -> their copies [R, H] and [R]."""
    count, experts = plan.place.shape
    width = tokens.shape[1]
    rows = tokens.new_empty(plan.rows, width)
    row_probs = None if probs is None else probs.new_empty(plan.rows)
    if count:
        _spread[(count,)](tokens, probs, plan.place, rows, row_probs, experts, width, **_sizes(width))
    return rows, row_probs


def gather(rows: Tensor, row_probs: Tensor | None, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """The transpose of `spread`: rows [R, H] -> sums [T, H], row_probs [R] -> [T, E]."""
    count, experts = plan.place.shape
    width = rows.shape[1]
    tokens = rows.new_empty(count, width)
    probs = None if row_probs is None else row_probs.new_empty(count, experts)
    if count:
        _gather[(count,)](rows, row_probs, plan.place, tokens, probs, experts, width, **_sizes(width))
    return tokens, probs


class Spread(torch.autograd.Function):
    """tokens [T, H], probs [T, E] -> [R, H], [R]."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, probs: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        ctx.plan = plan
        rows, row_probs = spread(tokens.contiguous(), probs.contiguous(), plan)
        assert row_probs is not None
        return rows, row_probs

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_probs: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return *gather(grad.contiguous(), grad_probs.contiguous(), ctx.plan), None


class Gather(torch.autograd.Function):
    """rows [R, H] -> [T, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return gather(rows.contiguous(), None, plan)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return spread(grad.contiguous(), None, ctx.plan)[0], None
