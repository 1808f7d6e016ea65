"""Splits the projection's output into queries, keys and values, and applies the rotary embedding, in one pass over
memory.

Shapes: S sequence, B batch, G query groups, n queries in a group, D head size; N = G * n.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEADS = 16  # of one token in one program


@triton.jit
def _rotate(  # noqa: ANN202
    mixed, q, k, v, cos, sin,  # noqa: ANN001
    q_s, q_b, q_h, k_s, k_b, k_h, v_s, v_b, v_h,  # noqa: ANN001
    batch, groups, queries, D: tl.constexpr, HEADS: tl.constexpr, BACK: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    """mixed [S, B, G, (n + 2) D] -> q, k, v; with BACK it turns their gradients into the gradient of mixed."""
    s = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    per = queries + 2
    head = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    group, kind = head // per, head % per
    real = head < groups * per
    half: tl.constexpr = D // 2
    column = tl.arange(0, half)
    c = tl.load(cos + s * half + column)[None, :]
    r = tl.load(sin + s * half + column)[None, :]
    mixed_at = mixed + ((s * batch + b) * groups * per + head)[:, None] * D + column[None, :]
    q_at = q + s * q_s + b * q_b + (group * queries + kind)[:, None] * q_h + column[None, :]
    k_at = k + s * k_s + b * k_b + group[:, None] * k_h + column[None, :]
    v_at = v + s * v_s + b * v_b + group[:, None] * v_h + column[None, :]
    is_q = (real & (kind < queries))[:, None]
    is_k = (real & (kind == queries))[:, None]
    is_v = (real & (kind == queries + 1))[:, None]
    if BACK:
        low = tl.load(q_at, mask=is_q, other=0.0).to(tl.float32)
        high = tl.load(q_at + half, mask=is_q, other=0.0).to(tl.float32)
        low += tl.load(k_at, mask=is_k, other=0.0).to(tl.float32)
        high += tl.load(k_at + half, mask=is_k, other=0.0).to(tl.float32)
        low += tl.load(v_at, mask=is_v, other=0.0).to(tl.float32)
        high += tl.load(v_at + half, mask=is_v, other=0.0).to(tl.float32)
        turned_low = tl.where(is_v, low, low * c + high * r)
        turned_high = tl.where(is_v, high, high * c - low * r)
        kept = real[:, None]
        tl.store(mixed_at, turned_low.to(mixed.dtype.element_ty), mask=kept)
        tl.store(mixed_at + half, turned_high.to(mixed.dtype.element_ty), mask=kept)
    else:
        low = tl.load(mixed_at, mask=real[:, None], other=0.0).to(tl.float32)
        high = tl.load(mixed_at + half, mask=real[:, None], other=0.0).to(tl.float32)
        turned_low = tl.where(is_v, low, low * c - high * r).to(q.dtype.element_ty)
        turned_high = tl.where(is_v, high, high * c + low * r).to(q.dtype.element_ty)
        tl.store(q_at, turned_low, mask=is_q)
        tl.store(q_at + half, turned_high, mask=is_q)
        tl.store(k_at, turned_low, mask=is_k)
        tl.store(k_at + half, turned_high, mask=is_k)
        tl.store(v_at, turned_low, mask=is_v)
        tl.store(v_at + half, turned_high, mask=is_v)


def _launch(mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> None:
    s, b, groups, wide = mixed.shape
    size = q.shape[-1]
    queries = wide // size - 2
    heads = HEADS
    grid = (s, b, triton.cdiv(groups * (queries + 2), heads))
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    _rotate[grid](
        mixed, q, k, v, cos, sin, *strides, b, groups, queries, D=size, HEADS=heads, BACK=back, num_warps=4
    )  # fmt: skip


class SplitRotate(torch.autograd.Function):
    """mixed [S, B, G, (n + 2) D], cos and sin [S, D / 2] fp32 -> q [S, B, N, D], k and v [S, B, G, D]."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, cos: Tensor, sin: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        s, b, groups, wide = mixed.shape
        q, k, v = (mixed.new_empty(s, b, n, size) for n in (groups * (wide // size - 2), groups, groups))
        _launch(mixed, q, k, v, cos, sin, back=False)
        ctx.save_for_backward(cos, sin)
        ctx.shape = mixed.shape
        return q, k, v

    @staticmethod
    def backward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        mixed = q.new_empty(ctx.shape)
        _launch(mixed, q, k, v, cos, sin, back=True)
        return mixed, None, None, None
