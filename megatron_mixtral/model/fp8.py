"""Experts whose weights are e4m3 with a scale for each row of a matrix, to be served: half the bytes of bf16.

They are made as weights are loaded, row by row, so that the model never has to fit in bf16. Shapes as in `layers`.
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

    A row of a matrix makes one number of the result, so that sums are scaled and no weight has to be.
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
        """With the scales that go with it, which `loading` fills as well."""
        made = super()._sharded(key, tensor, replica, **place)
        scales = self.scales["linear_fc2" in key]
        made.scales = scales.chunk(place.get("of", 1), dim=1)[place.get("part", 0)]  # type: ignore[attr-defined, union-attr]
        return made


def _ones(weight: Tensor) -> Tensor:
    return torch.ones(weight.shape[:2], dtype=torch.float32, device=weight.device)


@torch.no_grad()
def quantize(rows: Tensor, into: Tensor, scale: Tensor) -> None:
    """rows [..., K] -> into [..., K] in e4m3 and its scale [...]; of a row of zeros that is 1."""
    found = rows.abs().amax(-1).float() / LARGEST
    scale.copy_(torch.where(found > 0, found, 1.0))
    into.copy_(rows.float() / scale.unsqueeze(-1))


def missing() -> str | None:
    """Why FP8 can't be had on this GPU; None where it can, and without a GPU, slowly."""
    if not cpu.HAVE_GPU or (found := torch.cuda.get_device_capability()) >= NEEDS:
        return None
    has, wants = (".".join(map(str, capability)) for capability in (found, NEEDS))
    return f"{torch.cuda.get_device_name()} has compute capability {has}; FP8 needs {wants} or newer"


def describe(experts: Experts) -> str:
    """What is done with the weights here, for a log."""
    words = "experts' weights in FP8 (e4m3, a scale a row)"
    if grouped_gemm.tiles_serve(experts.linear_fc1, experts.linear_fc2):
        return f"{words}; batches by our grouped products, whose rows become FP8 as well"
    return f"{words}; prompts without our grouped products, slowly: they need a Hopper GPU and Triton 3.4"
