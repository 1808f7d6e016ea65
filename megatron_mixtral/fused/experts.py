"""The experts of one rank as grouped products around the fused activation, differentiated by hand.

By hand, because then the activation's backward kernel can work in place and weight gradients can be added where
they are kept. Shapes: R rows sorted by expert, E experts, H hidden, F expert width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixtral.fused import activation, gradients


class GroupedExperts(torch.autograd.Function):
    """rows [R, H], probs [R], counts [E], fc1 [E, 2F, H], fc2 [E, H, F] -> p * fc2(silu(gate) * up), [R, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, counts: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        products = _Products(rows, counts, fc1, fc2)
        both = products.of(rows, fc1.transpose(1, 2))
        inner = activation.forward(both, probs)
        ctx.save_for_backward(rows, probs, both, fc1, fc2)
        ctx.products = products
        ctx.used = False
        return products.of(inner, fc2.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        assert not ctx.used, "the activations became their gradients: there is no second backward pass"
        ctx.used = True
        rows, probs, both, fc1, fc2 = ctx.saved_tensors
        products: _Products = ctx.products
        grad = grad.contiguous()
        inner = products.of(grad, fc2)  # its gradient, until the next line makes it the value again
        grad_probs = activation.backward_in_place(both, probs, inner)
        grad_fc2 = products.weight_gradient(fc2, grad, inner)
        del inner
        grad_rows = products.of(both, fc1)
        grad_fc1 = products.weight_gradient(fc1, both, rows)
        return grad_rows, grad_probs, None, grad_fc1, grad_fc2


class _Products:
    """How the rows divide over experts, and the products: grouped where the chip can, else one by one."""

    def __init__(self, rows: Tensor, counts: Tensor, *weights: Tensor) -> None:
        self.grouped = rows.is_cuda and grouped_mm_serves(*weights)
        if self.grouped:
            on_device = counts.to(rows.device, torch.int32, non_blocking=True)
            self.ends = on_device.cumsum(0, dtype=torch.int32)
        accumulate = any(map(gradients.accumulates, weights))
        self.host = gradients.CountsOnHost(counts) if accumulate or not self.grouped else None

    def of(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [R, K], weight [E, K, N] -> [R, N]."""
        if self.grouped:
            return F.grouped_mm(x, weight, offs=self.ends)
        assert self.host is not None
        return torch.cat([part @ w for part, w in zip(x.split(self.host.get()), weight, strict=True)])

    def weight_gradient(self, weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
        """grad [R, N]^T x [R, K] of each expert: added to the weight's own buffer, or returned [E, N, K]."""
        if gradients.accumulates(weight):
            assert self.host is not None
            gradients.add_products(weight.main_grad, grad, x, self.host.get())  # type: ignore[attr-defined]
            gradients.mark_added(weight)
            return None
        if self.grouped:
            return F.grouped_mm(grad.t(), x, offs=self.ends)
        assert self.host is not None
        parts = zip(grad.split(self.host.get()), x.split(self.host.get()), strict=True)
        return torch.stack([g.t() @ part for g, part in parts])


def grouped_mm_serves(*weights: Tensor) -> bool:
    """Whether one grouped product can do all experts: bf16 on a GPU with rows of whole 16 bytes."""
    return hasattr(F, "grouped_mm") and all(
        w.is_cuda and w.dtype == torch.bfloat16 and w.shape[-1] % 8 == 0 and w.shape[-2] % 8 == 0 for w in weights
    )
