"""One rank's experts: grouped matmuls around the fused activation, with a backward pass written by hand.

So the activation's backward kernel works in place, and weight gradients are added to their buffers. Shapes: R rows
sorted by expert, E experts, H hidden, F expert width.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.kernels import swiglu, wgrad
from megatron_mixtral.kernels.grouped_gemm import Products, Scales, best


def forward(
    rows: Tensor, probs: Tensor, products: Products, fc1: Tensor, fc2: Tensor, scales: Scales = (None, None)
) -> Tensor:
    """Like `GroupedExperts`, but it keeps nothing for a backward pass; weights in FP8 have `scales`."""
    inner = products.swiglu(rows, fc1.transpose(1, 2), probs, scales[0])
    return products.of(inner, fc2.transpose(1, 2), scales[1])


class GroupedExperts(torch.autograd.Function):
    """rows [R, H], probs [R], counts [E], fc1 [E, 2F, H], fc2 [E, H, F] -> p * fc2(silu(gate) * up), [R, H]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probs: Tensor, counts: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        products = best(counts, fc1, fc2)
        both = products.of(rows, fc1.transpose(1, 2))
        inner = swiglu.forward(both, probs)
        ctx.save_for_backward(rows, probs, both, fc1, fc2)
        ctx.products = products
        ctx.used = False
        return products.of(inner, fc2.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        assert not ctx.used, "the gradients have overwritten the activations: a second backward pass isn't possible"
        ctx.used = True
        rows, probs, both, fc1, fc2 = ctx.saved_tensors
        products: Products = ctx.products
        grad = grad.contiguous()
        inner = products.of(grad, fc2)  # now its gradient; the next line restores the value
        grad_probs = swiglu.backward_in_place(both, probs, inner)
        grad_fc2 = _weight_gradient(products, fc2, grad, inner) if ctx.needs_input_grad[4] else None
        del inner
        grad_rows = products.of(both, fc1)
        grad_fc1 = _weight_gradient(products, fc1, both, rows) if ctx.needs_input_grad[3] else None
        return grad_rows, grad_probs, None, grad_fc1, grad_fc2


def _weight_gradient(products: Products, weight: Tensor, grad: Tensor, x: Tensor) -> Tensor | None:
    """grad [R, N]^T x [R, K] of each expert: added to the weight's own buffer, or returned [E, N, K]."""
    if not wgrad.accumulates(weight):
        return products.between(grad, x)
    products.add_between(weight.main_grad, grad, x)  # type: ignore[attr-defined]
    wgrad.mark_added(weight)
    return None
