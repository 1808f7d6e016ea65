"""Token embeddings whose gradient is added to its buffer, row by row.

Shapes: T tokens, V vocabulary, H hidden.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from megatron_mixtral.kernels import wgrad

COLUMNS = 1024
ROWS = 16


@triton.jit
def _add_rows(ids, order, grad, total, tokens, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # noqa: ANN001, ANN202
    """For ROWS neighbours sorted by id: sums the rows of an id, then adds the sum to the id's row."""
    first = tl.program_id(0) * ROWS
    at = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = at < width
    value = tl.zeros([COLUMNS], dtype=tl.float32)
    for place in range(first, tl.minimum(first + ROWS, tokens)):
        row = tl.load(order + place).to(tl.int64)
        value += tl.load(grad + row * width + at, mask=mask, other=0.0).to(tl.float32)
        token = tl.load(ids + place).to(tl.int64)
        following = tl.load(ids + place + 1, mask=(place + 1 < first + ROWS) & (place + 1 < tokens), other=-1)
        if following != token:
            tl.atomic_add(total + token * width + at, value, mask=mask)
            value = tl.zeros([COLUMNS], dtype=tl.float32)


def add_rows(total: Tensor, ids: Tensor, grad: Tensor) -> None:
    """total [V, H] fp32: each id's row += the sum of its gradients; ids [T], grad [T, H]."""
    ordered, order = ids.sort(stable=True)
    tokens, width = grad.shape
    grid = (triton.cdiv(tokens, ROWS), triton.cdiv(width, COLUMNS))
    _add_rows[grid](ordered, order, grad, total, tokens, width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)


class Embedding(torch.autograd.Function):
    """ids [...], weight [V, H] with a fp32 buffer for its gradient -> [..., H]."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, weight)
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:  # type: ignore[override]
        ids, weight = ctx.saved_tensors
        add_rows(weight.main_grad, ids.flatten(), grad.reshape(ids.numel(), -1))
        wgrad.mark_added(weight)
        return None, None
