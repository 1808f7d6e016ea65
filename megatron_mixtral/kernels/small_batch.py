"""Experts for small batches: every weight is read once, at memory bandwidth, and no count is copied to the host.

In both matmuls each program has a strip of one expert's matrix. Shapes: T tokens, k experts a token, R = T k rows
sorted by expert, E experts, H hidden, F expert width.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mixtral.kernels import grouped_gemm
from megatron_mixtral.kernels.choose_experts import Choice, Order
from megatron_mixtral.kernels.grouped_gemm import Scales

# Tokens above which grouped matmuls are faster on an H200: torch's, our own, and our own in FP8.
MOST, MOST_TILED, MOST_TILED_FP8 = 512, 32, 2


def most(fc1: Tensor, fc2: Tensor) -> float:
    """Most tokens for which these kernels are used instead of grouped matmuls."""
    in_fp8 = fc1.dtype == torch.float8_e4m3fn
    if not grouped_gemm.tiles_serve(fc1, fc2):
        return float("inf") if in_fp8 else MOST
    return MOST_TILED_FP8 if in_fp8 else MOST_TILED


@dataclass(frozen=True, kw_only=True)
class Strips:
    """How a matmul is divided: rows at once, columns of a program, depth of a step, parts of the sum."""

    rows: int
    wide: int
    deep: int
    parts: int
    warps: int
    stages: int


def strips(tokens: int, width: int, *, in_fp8: bool) -> tuple[Strips, Strips]:
    """Of the first and the second product, for a batch of `tokens` and an expert width of whole 64s.

    The fastest of a dozen on an H200 at Mixtral 8x7B's width and at half of it.
    """
    most = 4 if in_fp8 and tokens == 1 else 2 if tokens <= 8 else 1
    deep = 128 if width % 128 == 0 else 64
    parts = next(parts for parts in (4, 2, 1) if parts <= most and width % (parts * deep) == 0)
    if tokens <= 8:
        first = Strips(rows=16, wide=64, deep=128, parts=1, warps=4, stages=6 if in_fp8 else 4)
        second = Strips(rows=16, wide=32, deep=deep, parts=parts, warps=4, stages=5)
        second = replace(second, wide=64, stages=4) if in_fp8 else second
    elif tokens <= 128:
        rows, most_deep = (16, 128) if tokens <= 32 else (32, 128) if tokens <= 64 else (64, 64)
        first = Strips(rows=rows, wide=64, deep=most_deep, parts=1, warps=4, stages=4)
        second = replace(first, deep=min(deep, most_deep))
    else:
        first = Strips(rows=128, wide=64, deep=64, parts=1, warps=8, stages=4)
        second = Strips(rows=128, wide=128, deep=64, parts=1, warps=8, stages=4)
    return first, second


@triton.jit
def _half(value):  # noqa: ANN001, ANN202
    """A sixteenth in fp16, which two numbers in e4m3 become by one instruction; bf16 takes them five."""
    return tl.clamp(value.to(tl.float32) * 0.0625, -65504.0, 65504.0).to(tl.float16)


@triton.jit
def _first(  # noqa: ANN202
    x, weight, scale, probs, source, ends, inner, width, out_width, K: tl.constexpr,  # noqa: ANN001
    ROWS: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """inner [R, F] = silu(gate) * up * p for one strip of one expert; weights in FP8 have a scale a row."""
    expert = tl.program_id(1)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    depth = tl.arange(0, DEEP)
    gate_at = weight + (expert.to(tl.int64) * 2 * out_width + column)[None, :] * width + depth[:, None]
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        own = tl.load(source + row, mask=inside, other=0)
        x_at = x + (own // K).to(tl.int64)[:, None] * width + depth[None, :]
        gate = tl.zeros([ROWS, WIDE], tl.float32)
        up = tl.zeros([ROWS, WIDE], tl.float32)
        for k in range(0, width, DEEP):
            value = tl.load(x_at + k, mask=inside[:, None], other=0.0)
            if HALF:
                value = _half(value)
            gate = tl.dot(value, tl.load(gate_at + k).to(value.dtype), gate, input_precision="ieee")
            weights = tl.load(gate_at + out_width.to(tl.int64) * width + k).to(value.dtype)
            up = tl.dot(value, weights, up, input_precision="ieee")
        if scale is not None:
            scale_at = scale + expert * 2 * out_width + column
            gate *= tl.load(scale_at)[None, :] * (16.0 if HALF else 1.0)
            up *= tl.load(scale_at + out_width)[None, :] * (16.0 if HALF else 1.0)
        p = tl.load(probs + own, mask=inside, other=0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * up * p[:, None]
        to = inner + row.to(tl.int64)[:, None] * out_width + column[None, :]
        tl.store(to, value.to(inner.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _second(  # noqa: ANN202
    inner, weight, scale, ends, out, rows, width, out_width,  # noqa: ANN001
    PARTS: tl.constexpr, ROWS: tl.constexpr, WIDE: tl.constexpr, DEEP: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """out [PARTS, R, H]: one part of the sum over F, for one strip of one expert."""
    expert, part = tl.program_id(1), tl.program_id(2)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    column = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    depth = tl.arange(0, DEEP)
    share = width // PARTS
    w_at = weight + (expert.to(tl.int64) * out_width + column)[None, :] * width + part * share + depth[:, None]
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = row < end
        x_at = inner + row.to(tl.int64)[:, None] * width + part * share + depth[None, :]
        sums = tl.zeros([ROWS, WIDE], tl.float32)
        for k in range(0, share, DEEP):
            value = tl.load(x_at + k, mask=inside[:, None], other=0.0)
            if HALF:
                value = _half(value)
            sums = tl.dot(value, tl.load(w_at + k).to(value.dtype), sums, input_precision="ieee")
        if scale is not None:
            sums *= tl.load(scale + expert * out_width + column)[None, :] * (16.0 if HALF else 1.0)
        to = out + (part.to(tl.int64) * rows + row)[:, None] * out_width + column[None, :]
        tl.store(to, sums, mask=inside[:, None])


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The experts' output: the sum of `parts`, gathered by `place`, is the tokens' sum."""

    parts: Tensor  # [parts, R, H]
    place: Tensor  # [T, k] int32, -1: no row


def experts(
    x: Tensor, choice: Choice, order: Order, fc1: Tensor, fc2: Tensor, scales: Scales = (None, None)
) -> Rows:
    """x [T, H], fc1 [E, 2F, H], fc2 [E, H, F]; H is whole 128s, F 64s. Both of x's type, or e4m3 with `scales`."""
    (tokens, hidden), top_k = x.shape, choice.experts.shape[1]
    count, width, rows = fc1.shape[0], fc2.shape[2], tokens * top_k
    first, second = strips(tokens, width, in_fp8=scales[0] is not None)
    if x.dtype == torch.float32:  # or what is under way doesn't fit
        first, second = replace(first, stages=1), replace(second, stages=1)
    half = fc1.dtype == torch.float8_e4m3fn and x.dtype == torch.bfloat16
    inner = x.new_empty(rows, width)
    _first[(width // first.wide, count)](
        x, fc1, scales[0], choice.probs, order.source, order.ends, inner, hidden, width, K=top_k, ROWS=first.rows,
        WIDE=first.wide, DEEP=first.deep, HALF=half, num_warps=first.warps, num_stages=first.stages,
    )  # fmt: skip
    parts = x.new_empty(second.parts, rows, hidden, dtype=torch.float32)
    _second[(hidden // second.wide, count, second.parts)](
        inner, fc2, scales[1], order.ends, parts, rows, width, hidden, PARTS=second.parts, ROWS=second.rows,
        WIDE=second.wide, DEEP=second.deep, HALF=half, num_warps=second.warps, num_stages=second.stages,
    )  # fmt: skip
    return Rows(parts=parts, place=order.place)


@triton.jit
def _add_and_norm(  # noqa: ANN202
    residual, delta, parts, place, weight, out, rows, width, eps,  # noqa: ANN001
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """residual += delta, or += the token's rows; out = the new residual, normalised if there is a weight."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    here = residual + token * width + at
    value = tl.load(here, mask=mask, other=0.0).to(tl.float32)
    if K == 0:
        value += tl.load(delta + token * width + at, mask=mask, other=0.0).to(tl.float32)
    else:
        for k in tl.static_range(K):
            row = tl.load(place + token * K + k).to(tl.int64)
            for part in tl.static_range(PARTS):
                valid = mask & (row >= 0)
                value += tl.load(parts + (part * rows + row) * width + at, mask=valid, other=0.0)
    rounded = value.to(residual.dtype.element_ty)
    tl.store(here, rounded, mask=mask)
    if weight is not None:
        value = rounded.to(tl.float32)
        inverse = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
        normal = value * inverse * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(out + token * width + at, normal.to(out.dtype.element_ty), mask=mask)


def add_and_norm(residual: Tensor, added: Tensor | Rows, weight: Tensor | None, eps: float) -> Tensor:
    """Add `added` to residual [T, H] in place; returns its weighted norm [T, H], or the residual if there is no
    weight.
    """
    tokens, width = residual.shape
    out = residual if weight is None else torch.empty_like(residual)
    sizes = {"BLOCK": triton.next_power_of_2(width), "num_warps": 8 if width >= 2048 else 4}
    if isinstance(added, Rows):
        count, rows, _ = added.parts.shape
        _add_and_norm[(tokens,)](
            residual, None, added.parts, added.place, weight, out, rows, width, eps, K=added.place.shape[1],
            PARTS=count, **sizes,
        )  # fmt: skip
    else:
        _add_and_norm[(tokens,)](
            residual, added, None, None, weight, out, 0, width, eps, K=0, PARTS=0, **sizes
        )  # fmt: skip
    return out
