"""SwiGLU times the routing probability, silu(gate) * up * p, with one kernel forward and one backward.

The backward kernel works in place: the gradient overwrites the input, and the recomputed output overwrites its own
gradient. Shapes: R rows (tokens sent to experts), F expert width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048


@triton.jit
def _forward(both, probs, out, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    gate = tl.load(both + row * 2 * width + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(both + row * 2 * width + width + at, mask=mask, other=0.0).to(tl.float32)
    value = gate * tl.sigmoid(gate) * up * tl.load(probs + row).to(tl.float32)
    tl.store(out + row * width + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward(both, probs, grad, grad_probs, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    both += row * 2 * width
    grad += row * width
    p = tl.load(probs + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < width
        gate = tl.load(both + at, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(both + width + at, mask=mask, other=0.0).to(tl.float32)
        given = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += given * silu * up
        given_p = given * p
        tl.store(grad + at, (silu * up * p).to(grad.dtype.element_ty), mask=mask)
        grad_gate = given_p * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(both + at, grad_gate.to(both.dtype.element_ty), mask=mask)
        tl.store(both + width + at, (given_p * silu).to(both.dtype.element_ty), mask=mask)
    tl.store(grad_probs + row, tl.sum(total).to(grad_probs.dtype.element_ty))


def forward(both: Tensor, probs: Tensor) -> Tensor:
    """both [R, 2F] (gate, then up), probs [R] -> [R, F]."""
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty(rows, width)
    if rows:
        _forward[(rows, triton.cdiv(width, BLOCK))](both, probs, out, width, BLOCK=BLOCK, num_warps=8)
    return out


def backward_in_place(both: Tensor, probs: Tensor, grad: Tensor) -> Tensor:
    """Returns the gradient of probs [R]; `both` becomes its own gradient, and `grad` the forward result."""
    rows, width = grad.shape
    grad_probs = torch.empty_like(probs)
    if rows:
        _backward[(rows,)](both, probs, grad, grad_probs, width, BLOCK=BLOCK, num_warps=8)
    return grad_probs


class SwiGLU(torch.autograd.Function):
    """The differentiable pair, for use on its own."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, probs: Tensor) -> Tensor:
        ctx.save_for_backward(both, probs)
        return forward(both, probs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        both, probs = ctx.saved_tensors
        grad_both = both.clone()
        grad_probs = backward_in_place(grad_both, probs, grad.clone(memory_format=torch.contiguous_format))
        return grad_both, grad_probs
