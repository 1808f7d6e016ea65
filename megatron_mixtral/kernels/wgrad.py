"""Weight gradients are added to their fp32 buffers by the matmul's epilogue; nothing is copied.

megatron-core's data parallelism gives a parameter its `main_grad`. If it exists and is fp32, this is used.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor


def accumulates(weight: Tensor) -> bool:
    """Whether gradients of `weight` go straight to its fp32 buffer."""
    main = getattr(weight, "main_grad", None)
    return main is not None and main.dtype == torch.float32 and weight.dtype == torch.bfloat16


def add_product(total: Tensor, grad: Tensor, x: Tensor) -> None:
    """total [N, K] fp32 += grad [T, N]^T x [T, K], both bf16."""
    if total.is_cuda:
        torch.addmm(total, grad.t(), x, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(grad.t().float(), x.float())


def add_products(totals: Tensor, grad: Tensor, x: Tensor, counts: Sequence[int]) -> None:
    """totals [E, N, K] += each expert's matmul over its own rows of grad [R, N] and x [R, K]."""
    start = 0
    for total, count in zip(totals, counts, strict=True):
        if count:
            add_product(total, grad[start : start + count], x[start : start + count])
        start += count


def mark_added(weight: Tensor) -> None:
    """Tell data parallelism that this backward pass has added `weight`'s gradient.

    Its hook needs a gradient; one number expanded to the weight's shape costs no memory.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    weight.grad = weight.new_zeros(1).expand(weight.shape)


class CountsOnHost:
    """Rows of each expert, copied to the host during the forward pass, in time for the backward pass."""

    def __init__(self, counts: Tensor) -> None:
        self._counts = counts.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event() if counts.is_cuda else None
        if self._copied:
            self._copied.record()

    def get(self) -> list[int]:
        if self._copied:
            self._copied.synchronize()
        return self._counts.tolist()


def _add(x: Tensor, grad: Tensor, main_grad: Tensor) -> None:
    add_product(main_grad, grad, x)


# megatron-core's linear layers call this; name and functions are those of the CUDA extension that it looks for.
extension = SimpleNamespace(wgrad_gemm_accum_fp32=_add)
