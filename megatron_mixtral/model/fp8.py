"""Experts for serving whose weights are e4m3 with a scale for each row: half the bytes of bf16.

Weights are rounded row by row while they are loaded, so the model never has to fit in bf16. Shapes are those of
`layers`.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.kernels import grouped_gemm
from megatron_mixtral.mcore import cpu
from megatron_mixtral.model import layers

from megatron.core.dist_checkpointing import ShardedTensor

DTYPE = torch.float8_e4m3fn
LARGEST = torch.finfo(DTYPE).max
NEEDS = (8, 9)  # compute capability


class Experts(layers.Experts):
    """The same parameters in FP8, for models built without random weights and never trained.

    A scale belongs to one output channel, so it is applied to the accumulator and not to the weights.
    """

    weight_dtype = DTYPE

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scales = _ones(self.linear_fc1), _ones(self.linear_fc2)

    def _product(self, x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
        scale = self.scales[weight is self.linear_fc2]
        ends = tokens_per_expert.to(x.device).cumsum(0, dtype=torch.int32)
        return grouped_gemm.best_forward(ends, weight).of(x, weight.transpose(1, 2), scale)

    def _sharded(self, key: str, tensor: Tensor, replica: Any, **place: Any) -> ShardedTensor:
        """With its scales, which `loading` fills as well."""
        made = super()._sharded(key, tensor, replica, **place)
        scales = self.scales["linear_fc2" in key]
        made.scales = scales.chunk(place.get("of", 1), dim=1)[place.get("part", 0)]  # type: ignore[attr-defined, union-attr]
        return made


def _ones(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape[:2], dtype=torch.float32, device=weight.device)


@torch.no_grad()
def quantize(rows: Tensor, into: Tensor, scale: Tensor) -> None:
    """rows [..., K] -> into [..., K] in e4m3 and its scale [...]; a row of zeros has scale 1."""
    found = rows.abs().amax(-1).float() / LARGEST
    scale.copy_(torch.where(found > 0, found, 1.0))
    into.copy_(rows.float() / scale.unsqueeze(-1))


def missing() -> str | None:
    """Why this GPU can't do FP8; None if it can. Without a GPU it works, slowly."""
    if not cpu.HAVE_GPU or (found := torch.cuda.get_device_capability()) >= NEEDS:
        return None
    has, wants = (".".join(map(str, capability)) for capability in (found, NEEDS))
    return f"{torch.cuda.get_device_name()} has compute capability {has}; FP8 needs {wants} or newer"


def describe(experts: Experts) -> str:
    """How the weights are used here, for a log."""
    words = "experts' weights in FP8 (e4m3, a scale a row)"
    if grouped_gemm.tiles_serve(experts.linear_fc1, experts.linear_fc2):
        return f"{words}; batches by our grouped matmuls, with inputs in FP8 as well"
    return f"{words}; prompts are slow, because our grouped matmuls need a Hopper GPU and Triton 3.4"
