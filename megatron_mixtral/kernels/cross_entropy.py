"""Cross entropy straight from bf16 logits: fp32 is used only inside the kernel, and the gradient overwrites the
logits.

Each tensor-parallel rank has a slice of the vocabulary, and only a few numbers per token are exchanged. Shapes: T
tokens, V vocabulary of this rank.
"""

from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _forward(logits, labels, first, sums, targets, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """log(sum(exp)) of each row's slice, and the label's logit where it lies in the slice (else 0)."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    largest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(logits + at, mask=at < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(largest - safe) + tl.exp(value - safe)
        largest = higher
    peak = tl.max(largest)
    tl.store(sums + row, peak + tl.log(tl.sum(total * tl.exp(largest - peak))))
    label = tl.load(labels + row) - first
    inside = (label >= 0) & (label < width)
    tl.store(targets + row, tl.load(logits + label, mask=inside, other=0.0).to(tl.float32))


@triton.jit
def _backward(logits, labels, first, sums, grad, width, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    logits += row * width
    value = tl.load(logits + at, mask=mask, other=float("-inf")).to(tl.float32)
    share = tl.exp(value - tl.load(sums + row))
    share -= tl.where(at == tl.load(labels + row) - first, 1.0, 0.0)
    result = share * tl.load(grad + row)
    tl.store(logits + at, result.to(logits.dtype.element_ty), mask=mask)


class CrossEntropy(torch.autograd.Function):
    """logits [..., V] and labels [...] -> losses [...] in fp32; backward overwrites the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        logits, labels = logits.contiguous(), labels.contiguous()
        width, tokens = logits.shape[-1], labels.numel()
        first = 0 if group is None else group.rank() * width
        sums, targets = (torch.empty(labels.shape, dtype=torch.float32, device=logits.device) for _ in range(2))
        if tokens:
            _forward[(tokens,)](logits, labels, first, sums, targets, width, BLOCK=BLOCK, num_warps=8)
        if group is not None and group.size() > 1:
            sums = _log_add(sums, group)
            dist.all_reduce(targets, group=group)
        ctx.save_for_backward(logits, labels, sums)
        ctx.first, ctx.used = first, False
        return sums - targets

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        assert not ctx.used, "the gradient has overwritten the logits: a second backward pass isn't possible"
        ctx.used = True
        logits, labels, sums = ctx.saved_tensors
        width, tokens = logits.shape[-1], labels.numel()
        if tokens:
            grid = (tokens, triton.cdiv(width, BLOCK))
            given = grad.float().contiguous()
            _backward[grid](logits, labels, ctx.first, sums, given, width, BLOCK=BLOCK, num_warps=8)
        return logits, None, None


def _log_add(sums: Tensor, group: dist.ProcessGroup) -> Tensor:
    """log of the sum of exp over ranks."""
    largest = sums.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (sums - largest).exp()
    dist.all_reduce(total, group=group)
    return largest + total.log()
