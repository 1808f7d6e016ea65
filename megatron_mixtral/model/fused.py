"""megatron-core's modules with our kernels: the same parameters, names and results as in `layers`, but faster.

Each falls back to its base class for anything but training or plain evaluation of whole sequences.
"""

from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_mixtral.kernels import cross_entropy, embedding, experts, permute, rmsnorm, rope, wgrad
from megatron_mixtral.model import layers

from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer

# The fastest first; a backend is skipped if it can't do the case.
BACKENDS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


class RMSNorm(layers.RMSNorm):
    """One kernel forward, one backward."""

    def forward(self, x: Tensor) -> Tensor:
        return rmsnorm.RMSNorm.apply(x, self.weight, self.eps)


class BlockNorm(RMSNorm, layers.BlockNorm):
    """The same, for norms that are a module in Transformer Engine."""


class Attention(layers.Attention):
    """The best of torch's backends for this chip."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with sdpa_kernel(BACKENDS, set_priority=True):
            return super().forward(*args, **kwargs)


class RotarySelfAttention(SelfAttention):
    """Splits and rotates the projection's output in one kernel."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: Any = None,
        rotary_pos_emb: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        others = (key_value_states, inference_context, *args, *kwargs.values())
        if any(x is not None for x in others) or not isinstance(rotary_pos_emb, Tensor):
            return super().forward(
                hidden_states, attention_mask, key_value_states, inference_context, rotary_pos_emb, *args, **kwargs
            )
        size = self.hidden_size_per_attention_head
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.unflatten(-1, (self.num_query_groups_per_partition, -1))
        angles = rotary_pos_emb[:, 0, 0, : size // 2].float()
        query, key, value = rope.SplitRotate.apply(mixed, angles.cos(), angles.sin(), size)
        out = self.core_attention(query, key, value, attention_mask, attn_mask_type=self.attn_mask_type)
        return self.linear_proj(out)


class Experts(layers.Experts):
    """Grouped matmuls around the fused activation; weight gradients are added in place."""

    def forward(self, hidden: Tensor, tokens_per_expert: Tensor, probs: Tensor) -> tuple[Tensor, None]:
        weights = self.linear_fc1, self.linear_fc2
        return experts.GroupedExperts.apply(hidden, probs, tokens_per_expert, *weights), None


class MoE(MoELayer):
    """Routes without copying counts to the host if all experts are on this rank; otherwise uses the dispatcher."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        spread_out = self.ep_group.size() > 1 or self.experts.tensor_group.size() > 1
        other_way = self.moe_layer_recompute or self.config.moe_expert_capacity_factor or self.use_shared_expert
        if spread_out or intermediate_tensors is not None or padding_mask is not None or other_way:
            return super().forward(hidden_states, intermediate_tensors, padding_mask)
        probs, chosen = self.route(hidden_states)
        plan = permute.plan(chosen, self.config.moe_router_topk)
        rows, row_probs = permute.Spread.apply(hidden_states.flatten(0, -2), probs, plan)
        out, _ = self.experts(rows, plan.counts, row_probs)
        return permute.Gather.apply(out, plan).view(hidden_states.shape), None


def _look_up(table: VocabParallelEmbedding, ids: Tensor) -> Tensor:
    """Gradients are added to rows in place, where there is such a place and the whole vocabulary is here."""
    if table.tp_group.size() == 1 and not table.reduce_scatter_embeddings and wgrad.accumulates(table.weight):
        return embedding.Embedding.apply(ids, table.weight)
    return VocabParallelEmbedding.forward(table, ids)


class Model(GPTModel):
    """Its loss is computed directly from bf16 logits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.pre_process:
            table = self.embedding.word_embeddings  # megatron-core makes it of a class that it doesn't ask for
            table.forward = partial(_look_up, table)

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels [B, S], logits [S, B, V of this rank] -> [B, S]."""
        losses = cross_entropy.CrossEntropy.apply(logits, labels.transpose(0, 1), self.pg_collection.tp)
        return losses.transpose(0, 1).contiguous()


PARTS = layers.LayerParts(
    norm=RMSNorm,
    block_norm=BlockNorm,
    self_attention=RotarySelfAttention,
    core_attention=Attention,
    experts=Experts,
    moe=MoE,
)
