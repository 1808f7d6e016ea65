"""The decoder layer's parts in plain torch, which `build` puts together for megatron-core.

They write the same sharded tensor names as Transformer Engine's, so checkpoints move freely between the two.

Shapes: S sequence, B batch, N query heads and K key/value heads of this rank, D head size, T tokens routed to this
rank, E experts of this rank, H hidden, F expert width of this rank.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixtral.kernels.grouped_gemm import grouped_mm_serves
from megatron_mixtral.mcore import ranks

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.parallel_state import get_context_parallel_group
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    get_cuda_rng_tracker,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import get_expert_parallel_rng_tracker_name
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_object_for_checkpoint

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
VARLEN = TORCH >= (2, 11)  # the first version with one kernel for segments, a scale and a window


def window_of(config: TransformerConfig) -> int | None:
    """Tokens that a query sees, including itself; None means all earlier ones. megatron-core's window excludes the
    query itself.
    """
    return config.window_size[0] + 1 if config.window_size else None


class RMSNorm(torch.nn.RMSNorm):
    """Root-mean-square normalisation over H, replicated on tensor-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, device=ranks.device(), dtype=config.params_dtype)
        # Under sequence parallelism each rank sees its share of the tokens, so gradients are summed over ranks.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class BlockNorm(RMSNorm):
    """A norm that is also a module in Transformer Engine, with the empty object that it has in checkpoints."""

    def get_extra_state(self) -> None:
        return None

    def set_extra_state(self, _: Any) -> None: ...


class Attention(MegatronModule):
    """softmax(Q K^T / sqrt D) V by torch's scaled_dot_product_attention: causal, grouped, windowed if asked."""

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.scale = softmax_scale or config.kv_channels**-0.5
        self.window = window_of(config)
        self.dropout = config.attention_dropout

    def forward(
        self,
        query: Tensor,  # [S, B, N, D]
        key: Tensor,  # [S', B, K, D]; S' > S while decoding
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:  # [S, B, N * D]
        """Causal, and the mask is ignored: query i is at position S' - S + i.

        With `packed_seq_params` query [T, N, D], key and value are segments laid end to end that don't see each
        other, and the result is [T, N * D].
        """
        assert attention_bias is None, "Mixtral has no attention bias"
        if packed_seq_params is not None:
            return self._packed(query, key, value, packed_seq_params)
        if self.config.context_parallel_size > 1:
            return self._over_ranks(query, key, value)
        return self._attend(query, key, value)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        mask = causal_mask(q.shape[2], k.shape[2], self.window, q.device)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None and q.shape[2] > 1,
            scale=self.scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _over_ranks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this rank's two segments of the sequence to all earlier tokens, gathered from all ranks.

        Of 2 C segments rank r has numbers r and 2 C - 1 - r, so every rank has the same work.
        """
        group = get_context_parallel_group()
        rank, last = group.rank(), 2 * group.size() - 1
        keys, values = (_in_order(gather_from_sequence_parallel_region(x, group=group), last) for x in (key, value))
        seen = [
            self._attend(q, torch.cat(keys[: number + 1]), torch.cat(values[: number + 1]))
            for q, number in zip(query.chunk(2), (rank, last - rank), strict=True)
        ]
        return torch.cat(seen)

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, packed: Any) -> Tensor:
        ends = packed.cu_seqlens_q
        if varlen_serves(query):
            from torch.nn.attention.varlen import (
                varlen_attn,
            )  # imported here, because it imports dynamo, 0.7 s a rank

            back = self.window - 1 if self.window else -1
            longest = packed.max_seqlen_q
            settings: dict[str, Any] = {"scale": self.scale, "window_size": (back, 0)}
            if TORCH >= (2, 12):  # older versions always group queries
                settings["enable_gqa"] = query.shape[1] != key.shape[1]
            out: Any = varlen_attn(query, key, value, ends, ends, longest, longest, **settings)
            return out.flatten(1)
        lengths = ends.diff().tolist()
        parts = zip(*(x.unsqueeze(1).split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self._attend(*part).squeeze(1) for part in parts])


def _in_order(gathered: Tensor, last: int) -> list[Tensor]:
    """Segments in the sequence's order, from the order of ranks."""
    parts = gathered.chunk(last + 1)
    return [parts[2 * n] if 2 * n < last else parts[2 * (last - n) + 1] for n in range(last + 1)]


def varlen_serves(x: Tensor) -> bool:
    """Whether one kernel can do all segments: half precision on a GPU."""
    return VARLEN and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """True where a query may look, [S, S']; None if the causal kernel (or no mask) does the same."""
    if (window is None or window >= keys) and queries in (1, keys):
        return None
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None, :]
    seen = other <= position
    return seen if window is None else seen & (other > position - window)


class Experts(MegatronModule):
    """All experts of this rank as two stacked matrices: w2(silu(w1 x) * (w3 x)) for the tokens sent to each."""

    weight_dtype: torch.dtype | None = None  # None: the model's
    scales: tuple[Tensor, Tensor] | tuple[None, None] = (None, None)  # of both matrices' rows, if they have any

    def __init__(
        self, num_local_experts: int, config: TransformerConfig, pg_collection: Any = None, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.count = num_local_experts
        self.expert_group, self.tensor_group, self.data_group = (
            pg_collection.ep,
            pg_collection.expt_tp,
            pg_collection.expt_dp,
        )
        parts = self.tensor_group.size()
        assert config.moe_ffn_hidden_size % parts == 0, "Layout.check lets whole parts through only"
        width = config.moe_ffn_hidden_size // parts
        # linear_fc1 [E, 2F, H] has gate above up, as in every Megatron checkpoint; linear_fc2 is [E, H, F].
        self.linear_fc1 = self._stacked(2 * width, config.hidden_size, dim=1)
        self.linear_fc2 = self._stacked(config.hidden_size, width, dim=2)
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_expert_parallel_rng_tracker_name()):
                config.init_method(self.linear_fc1)
                config.output_layer_init_method(self.linear_fc2)
        self.grouped = grouped_mm_serves(self.linear_fc1, self.linear_fc2)

    def _stacked(self, rows: int, columns: int, *, dim: int) -> torch.nn.Parameter:
        dtype = self.weight_dtype or self.config.params_dtype
        weight = torch.nn.Parameter(torch.empty(self.count, rows, columns, dtype=dtype, device=ranks.device()))
        set_tensor_model_parallel_attributes(weight, True, dim, 1)  # every rank's part counts in the norm
        return weight

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        """hidden [T, H] sorted by expert, tokens_per_expert [E], probs [T] -> [T, H], a partial sum over
        expert-tensor ranks.

        Experts' tokens follow each other; an expert may have none.
        """
        both = self._product(hidden, self.linear_fc1, tokens_per_expert)
        return self._product(swiglu(both, probs), self.linear_fc2, tokens_per_expert), None

    def _product(self, x: Tensor, weight: Tensor, tokens_per_expert: Tensor) -> Tensor:
        return products(x, weight, tokens_per_expert, grouped=self.grouped)

    def backward_dw(self) -> None:
        """The backward pass itself computes weight gradients."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Iterable[tuple[int, int, int]] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """`experts.linear_fcN.weight` with an expert axis behind the layer's, as Transformer Engine has it."""
        offsets = tuple(sharded_offsets)
        replica = (0, 0, self.data_group.rank())
        shard = partial(self._sharded, offsets=offsets)
        key = f"{prefix}experts.linear_fc1.weight"
        if self.tensor_group.size() == 1:
            fc1 = shard(key, self.linear_fc1, replica, axis=1)  # loaded in place, with no second copy
        else:
            split = partial(split_gate_up, shard)
            fc1 = ShardedTensorFactory(key, self.linear_fc1, split, join_gate_up, replica)
        fc2 = shard(f"{prefix}experts.linear_fc2.weight", self.linear_fc2, replica, axis=2)
        tensors = {f"{prefix}linear_fc1": fc1, f"{prefix}linear_fc2": fc2}
        return tensors | self._extra_states(prefix, offsets)

    def _sharded(
        self, key: str, tensor: Tensor, replica: Any, *, axis: int, offsets: Any, part: int = 0, of: int = 1
    ) -> ShardedTensor:
        """One [E, ., .] block, cut over expert-parallel ranks and on `axis` over expert-tensor-parallel ones."""
        front, group = len(offsets), self.tensor_group
        return ShardedTensor.from_rank_offsets(
            key,
            tensor,
            *offsets,
            (front, self.expert_group.rank(), self.expert_group.size()),
            (front + axis, part * group.size() + group.rank(), of * group.size()),
            replica_id=replica,
            prepend_axis_num=front,
        )

    def _extra_states(self, prefix: str, offsets: Any) -> dict[str, Any]:
        """Empty objects that a Transformer Engine model needs in its checkpoint, one for each expert and matrix."""
        first, total = self.expert_group.rank() * self.count, self.expert_group.size() * self.count
        replica = (0, self.tensor_group.rank(), self.data_group.rank())
        return {
            f"{prefix}{fc}._extra_state{i}": make_sharded_object_for_checkpoint(
                None,
                f"{prefix}experts.{fc}._extra_state",
                (*offsets, (len(offsets), first + i, total)),
                replica,
            )
            for fc in ("linear_fc1", "linear_fc2")
            for i in range(self.count)
        }


@torch.no_grad()
def split_gate_up(shard: Any, key: str, tensor: Tensor, replica: Any, _: Any) -> list[ShardedTensor]:
    """Gate and up have separate places in the global [E, 2F, H]; otherwise tensor-parallel shards of both would
    interleave.
    """
    gate, up = tensor.chunk(2, dim=1)
    return [shard(key, half, replica, axis=1, part=i, of=2) for i, half in enumerate((gate, up))]


@torch.no_grad()
def join_gate_up(halves: list[Tensor]) -> Tensor:
    return torch.cat(halves, dim=1)


def swiglu(both: Tensor, probs: Tensor) -> Tensor:
    """both [T, 2F] (gate, then up), probs [T] -> [T, F] in the type of `both`."""
    gate, up = both.chunk(2, dim=-1)
    return (F.silu(gate) * up * probs.unsqueeze(-1)).to(both.dtype)


def products(x: Tensor, weight: Tensor, tokens_per_expert: Tensor, *, grouped: bool) -> Tensor:
    """x [T, K] sorted by expert, weight [E, N, K] -> [T, N]: each row times its own expert's matrix."""
    if grouped:
        ends = tokens_per_expert.to(x.device, torch.int32).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    parts = x.split(tokens_per_expert.tolist())
    return torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The parts of the layers; `model.fused` has faster ones with the same parameters."""

    norm: type = RMSNorm
    block_norm: type = BlockNorm
    self_attention: type = SelfAttention
    core_attention: type = Attention
    experts: type = Experts
    moe: type = MoELayer
