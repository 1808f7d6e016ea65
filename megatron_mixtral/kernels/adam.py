"""AdamW in one pass: it reads each number once, applies the clipping factor, and also writes the model's bf16 copy.

State and settings are those of torch's AdamW, so checkpoints are the same.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096


@triton.jit
def _update(  # noqa: ANN202
    main, grad, average, square, model, count,  # noqa: ANN001
    keep, step_size, beta1, beta2, root, eps, scale, COPY: tl.constexpr, BLOCK: tl.constexpr,  # noqa: ANN001
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    g = tl.load(grad + at, mask=mask, other=0.0) * scale
    m = tl.load(average + at, mask=mask, other=0.0)
    v = tl.load(square + at, mask=mask, other=0.0)
    m += (g - m) * (1 - beta1)
    v = v * beta2 + g * g * (1 - beta2)
    value = tl.load(main + at, mask=mask, other=0.0) * keep
    value -= step_size * (m / (tl.sqrt(v) * root + eps))
    tl.store(average + at, m, mask=mask)
    tl.store(square + at, v, mask=mask)
    tl.store(main + at, value, mask=mask)
    if COPY:
        tl.store(model + at, value.to(model.dtype.element_ty), mask=mask)


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW with another `step`: `scale` multiplies gradients, `copies` has the parameters' bf16 copies."""

    def __init__(self, groups: list[dict[str, Any]], copies: dict[Tensor, Tensor]) -> None:
        super().__init__(groups)
        self.scale, self.copies = 1.0, copies

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            assert not group["amsgrad"]
            assert not group["maximize"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        step, (beta1, beta2), lr = float(state["step"]), group["betas"], float(group["lr"])
        copy = self.copies.get(parameter)
        _update[(triton.cdiv(parameter.numel(), BLOCK),)](
            parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], copy, parameter.numel(),
            1 - lr * group["weight_decay"], lr / (1 - beta1**step), beta1, beta2, (1 - beta2**step) ** -0.5,
            group["eps"], self.scale, COPY=copy is not None, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
