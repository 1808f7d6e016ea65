"""Low-rank adapters on a built model: everything else is frozen, and the adapters' output is computed separately.

`weights.lora` has their names and shapes. Their initial values depend only on the seed, so every layout trains
alike. Shapes: S sequence, B batch, H hidden, T tokens routed to this rank, E experts of this rank, r rank.
"""

import hashlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_mixtral.kernels.grouped_gemm import grouped_mm_serves
from megatron_mixtral.mcore import ranks
from megatron_mixtral.model import layers
from megatron_mixtral.weights.lora import SIDES, Lora

from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import get_cuda_rng_tracker, set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


def attach(model: GPTModel, lora: Lora, *, seed: int) -> None:
    """Freeze `model` and give each layer adapters whose initial output is zero.

    Experts are adapted if the model was built with this module's `Experts`.
    """
    for parameter in model.parameters():
        parameter.requires_grad = False
    for layer in model.decoder.layers:
        first = First(seed=seed, layer=layer.layer_number)
        own = AttentionAdapters(layer.self_attention, lora, first)
        layer.self_attention.adapters = own
        layer.self_attention.linear_qkv.register_forward_hook(partial(_add, own.qkv))
        layer.self_attention.linear_proj.register_forward_hook(partial(_add, own.proj))
        if lora.experts:
            layer.mlp.experts.adapt(lora, first)
    if model.pre_process:
        model.embedding.register_forward_hook(_differentiate)


def _add(what: Any, _: torch.nn.Module, inputs: tuple[Tensor], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    out, bias = output
    return out + what(inputs[0]), bias


def _differentiate(_: torch.nn.Module, __: Any, hidden: Tensor) -> Tensor | None:
    """Recomputed layers give their adapters a gradient only if their input has one, too."""
    return hidden.requires_grad_() if torch.is_grad_enabled() else None


class First:
    """Initial values of one layer's adapters."""

    def __init__(self, *, seed: int, layer: int) -> None:
        self.seed, self.layer = seed, layer

    def lora_a(self, rank: int, into: int, *name: Any) -> Tensor:
        """[rank, into], uniform as PEFT draws them."""
        drawn = hashlib.blake2b(repr((self.seed, self.layer, *name)).encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(drawn, "little") >> 1)
        return (torch.rand(rank, into, generator=generator) * 2 - 1) * into**-0.5


class Pair(torch.nn.Module):
    """lora_A and lora_B of one matrix, or stacked for the experts: this rank's part of them."""

    def __init__(self, lora_a: Tensor, out: int, dtype: torch.dtype) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": ranks.device(), "dtype": dtype}
        rank = lora_a.shape[-2]
        self.lora_A = torch.nn.Parameter(lora_a.to(**place).contiguous())
        self.lora_B = torch.nn.Parameter(torch.zeros(*lora_a.shape[:-2], out, rank, **place))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Both matrices. This call tells megatron-core that the ranks' new values are needed now."""
        return self.lora_A, self.lora_B


class AttentionAdapters(torch.nn.Module):
    """Adapters of the query, key, value and output projections of one layer, divided like these by tensor
    parallelism.
    """

    def __init__(self, attention: Any, lora: Lora, first: First) -> None:
        super().__init__()
        config = attention.config
        group = parallel_state.get_tensor_model_parallel_group()
        self.parts, self.part = group.size(), group.rank()
        assert self.parts == 1 or config.sequence_parallel, "tensor parallelism also divides the sequence"
        self.scale, self.dropout = lora.scale, lora.dropout
        self.groups = config.num_query_groups // self.parts
        queries = config.num_attention_heads * config.kv_channels // self.parts
        keys = self.groups * config.kv_channels
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            pair = Pair(first.lora_a(lora.rank, config.hidden_size, name), out, config.params_dtype)
            self.add_module(name, self._marked(pair, cut="lora_B"))
        of_output = first.lora_a(lora.rank, queries * self.parts, "o_proj").chunk(self.parts, dim=1)[self.part]
        pair = Pair(of_output, config.hidden_size, config.params_dtype)
        self.o_proj = self._marked(pair, cut="lora_A")

    def _marked(self, pair: Pair, *, cut: str) -> Pair:
        """One side is divided over tensor-parallel ranks; the other sees a share of the tokens on each rank."""
        for name, parameter in pair.named_parameters():
            if name == cut:
                set_tensor_model_parallel_attributes(parameter, True, 0 if cut == "lora_B" else 1, 1)
            else:
                parameter.sequence_parallel = self.parts > 1  # type: ignore[attr-defined]
        return pair

    def qkv(self, x: Tensor) -> Tensor:
        """[S of this rank, B, H] -> [S, B, queries, key and value of each group in turn]."""
        pairs: Any = (self.q_proj, self.k_proj, self.v_proj)
        a, b = zip(*(pair() for pair in pairs), strict=True)
        low = F.linear(self._dropped(x), torch.cat(a)) * self.scale
        if self.parts > 1:
            low = gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
        parts = zip(low.chunk(3, dim=-1), b, strict=True)
        out = [F.linear(part, lora_b).unflatten(-1, (self.groups, -1)) for part, lora_b in parts]
        return torch.cat(out, dim=-1).flatten(-2)

    def proj(self, x: Tensor) -> Tensor:
        """[S, B, heads of this rank] -> [S of this rank, B, H]."""
        lora_a, lora_b = self.o_proj()
        low = F.linear(self._dropped(x), lora_a) * self.scale
        if self.parts > 1:
            low = reduce_scatter_to_sequence_parallel_region(low)
        return F.linear(low, lora_b)

    def _dropped(self, x: Tensor) -> Tensor:
        if not self.dropout or not self.training:
            return x
        with get_cuda_rng_tracker().fork():  # tensor-parallel ranks have different parts of the input
            return F.dropout(x, self.dropout)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """`q_proj.lora_A` and so on, with the layer's axis in front."""
        data = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        cuts = {f"{name}.lora_B": 0 for name in ("q_proj", "k_proj", "v_proj")} | {"o_proj.lora_A": 1}
        return {
            f"{prefix}{name}": _sharded(
                f"{prefix}{name}",
                parameter,
                tuple(sharded_offsets),
                cut=(cuts[name], self.part, self.parts) if name in cuts else None,
                replica=(0, 0 if name in cuts else self.part, data),
            )
            for name, parameter in self.named_parameters()
        }


class Experts(layers.Experts):
    """Experts in plain torch whose two matmuls have adapters."""

    def adapt(self, lora: Lora, first: First) -> None:
        """Give every expert of this rank its own adapters."""
        config, group = self.config, self.tensor_group
        self.scale = lora.scale
        numbers = range(self.expert_group.rank() * self.count, (self.expert_group.rank() + 1) * self.count)

        def lora_a(name: str, into: int) -> Tensor:
            return torch.stack([first.lora_a(lora.rank, into, name, number) for number in numbers])

        width, dtype = config.moe_ffn_hidden_size, config.params_dtype
        of_inner = lora_a("down_proj", width).chunk(group.size(), dim=2)[group.rank()]
        self.adapters = torch.nn.ModuleDict(
            {
                "gate_up_proj": Pair(lora_a("gate_up_proj", config.hidden_size), 2 * width // group.size(), dtype),
                "down_proj": Pair(of_inner, config.hidden_size, dtype),
            }
        )
        for name, parameter in self.adapters.named_parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            set_tensor_model_parallel_attributes(parameter, True, 0, 1)
            # Parameters that are the same on expert-tensor ranks count once in the gradient's norm.
            parameter.shared = name not in CUTS and group.rank() > 0  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """As without adapters, plus the adapters' output before and after the activation."""
        both = self._product(hidden, self.linear_fc1, tokens_per_expert)
        both = both + self._added("gate_up_proj", hidden, tokens_per_expert)
        # Recomputed in the backward pass, because keeping its outputs would need more memory than everything else
        # here.
        inner = checkpoint(layers.swiglu, both, probs, use_reentrant=False, preserve_rng_state=False)
        out = self._product(inner, self.linear_fc2, tokens_per_expert)
        return out + self._added("down_proj", inner, tokens_per_expert), None

    def _added(self, name: str, x: Tensor, tokens_per_expert: Tensor) -> Tensor:
        pair = zip(SIDES, self.adapters[name](), strict=True)
        a, b = (self._whole(f"{name}.{side}", parameter) for side, parameter in pair)
        grouped = grouped_mm_serves(a, b)
        low = layers.products(x, a, tokens_per_expert, grouped=grouped) * self.scale
        return layers.products(low, b, tokens_per_expert, grouped=grouped)

    def _whole(self, name: str, parameter: Tensor) -> Tensor:
        """Each expert-tensor rank sees a part of the gradient of a shared parameter, so the parts are summed."""
        if name in CUTS or self.tensor_group.size() == 1:
            return parameter
        return copy_to_tensor_model_parallel_region(parameter, group=self.tensor_group)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """The base's, and `experts.adapters...` with an expert axis behind the layer's."""
        found = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for name, parameter in self.adapters.named_parameters():
            key = f"{prefix}experts.adapters.{name}"
            found[f"{prefix}adapters.{name}"] = self._shard_of_adapter(key, name, parameter, tuple(sharded_offsets))
        return found

    def _shard_of_adapter(self, key: str, name: str, parameter: Tensor, offsets: Any) -> Any:
        part, parts = self.tensor_group.rank(), self.tensor_group.size()
        replica = (0, 0 if name in CUTS else part, self.data_group.rank())
        if name == GATE_UP_B and parts > 1:
            split = partial(layers.split_gate_up, partial(self._sharded, offsets=offsets))
            return ShardedTensorFactory(key, parameter, split, layers.join_gate_up, replica)
        experts = (len(offsets), self.expert_group.rank(), self.expert_group.size())
        cut = (1 + CUTS[name], part, parts) if name in CUTS else None
        return _sharded(key, parameter, (*offsets, experts), cut=cut, replica=replica, front=len(offsets))


GATE_UP_B = "gate_up_proj.lora_B"
CUTS = {GATE_UP_B: 0, "down_proj.lora_A": 1}  # by expert-tensor parallelism, and on which axis


def _sharded(
    key: str,
    tensor: Tensor,
    offsets: tuple[tuple[int, int, int], ...],
    *,
    cut: tuple[int, int, int] | None,
    replica: Any,
    front: int | None = None,
) -> ShardedTensor:
    """`tensor` behind `front` axes of its own place, cut on one of its axes if at all: (axis, part, parts)."""
    front = len(offsets) if front is None else front
    cuts = ((front + cut[0], *cut[1:]),) if cut else ()
    return ShardedTensor.from_rank_offsets(key, tensor, *offsets, *cuts, replica_id=replica, prepend_axis_num=front)
