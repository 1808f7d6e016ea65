"""Measures of a step besides its loss: FLOPs, memory, and the balance of the experts.

Only FLOPs that the model needs are counted: not those of recomputation, and half of causal attention.
"""

import resource
from math import prod
from typing import Any

import torch

from megatron_mixtral.mcore import cpu, ranks
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import tensors

from megatron.core.transformer.moe.router import TopKRouter

# Dense bf16 TFLOP/s, by a part of CUDA's name of the device; the first match counts.
PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "L40": 181,
    "A10": 125,
    "RTX PRO 6000": 504,
    "V100": 125,
}


def flops_per_token(shape: MixtralShape, sequence_length: int) -> float:
    """Of one token's forward and backward pass."""
    width = shape.num_attention_heads * shape.head_dim
    scores = shape.num_hidden_layers * width * sequence_length  # two products, half of each
    return 6.0 * (_weights_per_token(shape) + scores)


def _weights_per_token(shape: MixtralShape) -> int:
    """Numbers that a token is multiplied with: all matrices, of the experts those that it is sent to."""
    tables = 1 if shape.tie_word_embeddings else 2  # looking up a row multiplies nothing
    weights = (1 - tables) * shape.vocab_size * shape.hidden_size
    for name, size in tensors.shapes(shape).items():
        if len(size) > 1 + tensors.megatron_axes(name):  # not a norm
            experts = name.startswith(tensors.EXPERTS)
            weights += prod(size) * shape.num_experts_per_tok // size[1] if experts else prod(size)
    return weights


def peak() -> float | None:
    """This GPU's dense bf16 TFLOP/s; None for one that isn't in the table, and without a GPU."""
    if not cpu.HAVE_GPU:
        return None
    name = torch.cuda.get_device_name()
    return next((float(rate) for part, rate in PEAKS.items() if part in name), None)


def memory() -> float:
    """This rank's peak memory in GiB: of its GPU, or of the process if there is no GPU."""
    if cpu.HAVE_GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class ExpertLoad:
    """Counts the tokens that each layer's router sends to each expert while the model trains."""

    def __init__(self, chunks: list[torch.nn.Module], shape: MixtralShape) -> None:
        self._counts = torch.zeros(
            shape.num_hidden_layers, shape.num_local_experts, dtype=torch.float64, device=ranks.device()
        )
        for module in (m for chunk in chunks for m in chunk.modules() if isinstance(m, TopKRouter)):
            module.register_forward_hook(self._count)

    def _count(self, router: Any, _: Any, routed: tuple[torch.Tensor, torch.Tensor]) -> None:
        if not router.training or not torch.is_grad_enabled():
            return  # validation, or a pass that is recomputed and counted later
        with torch.no_grad():
            sent = routed[1].reshape(-1, self._counts.shape[1])
            if router.config.moe_pad_expert_input_to_capacity:
                sent = sent & (routed[0].reshape(sent.shape) > 0)  # the others are padding rows
            self._counts[router.layer_number - 1] += sent.sum(0)

    def take(self) -> list[float]:
        """This rank's counts since the last time, layer after layer."""
        counts = self._counts.flatten().tolist()
        self._counts.zero_()
        return counts


def balance(counts: list[float], experts: int) -> tuple[float, float]:
    """(mean, worst) over the layers: the busiest expert's tokens divided by the mean; 1 is perfect balance.
    `counts` are of all ranks.
    """
    layers = torch.tensor(counts, dtype=torch.float64).view(-1, experts)
    layers = layers[layers.sum(1) > 0]
    if not len(layers):
        return 0.0, 0.0
    loads = layers.max(1).values / layers.mean(1)
    return float(loads.mean()), float(loads.max())
