"""Root-mean-square normalisation, x / rms(x) * weight, with one pass forward and one backward.

Shapes: T rows, H their width; one program holds a whole row.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # four programs on each of 132 multiprocessors; each sums its rows' part of the weight's gradient


@triton.jit
def _forward(x, weight, out, scale, width, eps, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < width
    value = tl.load(x + row * width + at, mask=mask, other=0.0).to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(value * value) / width + eps)
    tl.store(scale + row, inverse)
    result = value * inverse * tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(x, weight, scale, grad, grad_x, grad_weight, rows, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    program = tl.program_id(0)
    at = tl.arange(0, BLOCK)
    mask = at < width
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    start = program.to(tl.int64) * width
    next_x = tl.load(x + start + at, mask=mask, other=0.0)
    next_grad = tl.load(grad + start + at, mask=mask, other=0.0)
    for row in range(program, rows, tl.num_programs(0)):
        here = start + at
        inverse = tl.load(scale + row)
        normal, given = next_x.to(tl.float32) * inverse, next_grad.to(tl.float32)
        start += tl.num_programs(0) * width  # the next row is loaded while this one is reduced
        more = mask & (row + tl.num_programs(0) < rows)
        next_x = tl.load(x + start + at, mask=more, other=0.0)
        next_grad = tl.load(grad + start + at, mask=more, other=0.0)
        total += given * normal
        given *= w
        result = (given - normal * (tl.sum(given * normal) / width)) * inverse
        tl.store(grad_x + here, result.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_weight + program.to(tl.int64) * width + at, total, mask=mask)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [..., H], contiguous -> its norm, and one over each row's root mean square."""
    width = x.shape[-1]
    rows = x.numel() // width
    out = torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    if rows:
        _forward[(rows,)](x, weight, out, scale, width, eps, BLOCK=block, num_warps=_warps(block))
    return out, scale


class RMSNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> the same shape as x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x = x.contiguous()
        out, scale = forward(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, scale = ctx.saved_tensors
        width, rows = x.shape[-1], scale.shape[0]
        grad_x = torch.empty_like(x)
        programs = max(1, min(PROGRAMS, rows))
        parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(width)
        _backward[(programs,)](
            x, weight, scale, grad.contiguous(), grad_x, parts, rows, width, BLOCK=block, num_warps=_warps(block)
        )
        return grad_x, parts.sum(0).to(weight.dtype), None


def _warps(block: int) -> int:
    return min(max(block // 512, 1), 8)
