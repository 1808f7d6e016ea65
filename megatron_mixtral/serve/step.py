"""One forward pass of the engine's batch by our own kernels: decoding as a CUDA graph, prompts without one.

Reads the engine's bookkeeping where it lies on the device and writes keys and values into the engine's cache, so
the two can take turns on any request. Shapes: T tokens of all requests in a row, R requests, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixtral import fused, mcore
from megatron_mixtral.layers import Experts

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

Attend = Callable[[Tensor, Tensor], Tensor]


def missing(model: GPTModel) -> str | None:
    """Why the engine's own forward pass is used for `model`; None when ours can be."""
    if reason := fused.missing():
        return reason
    if mcore.VERSION < (0, 17):
        return f"megatron-core {mcore.VERSION[0]}.{mcore.VERSION[1]} keeps its bookkeeping on the device"
    state = parallel_state
    ranks = state.get_tensor_model_parallel_world_size() * state.get_pipeline_model_parallel_world_size()
    if ranks * state.get_expert_model_parallel_world_size() > 1:
        return "the model is spread over ranks"
    config, shape = model.config, model.shape
    if not isinstance(model.decoder.layers[0].mlp.experts, Experts):
        return "Transformer Engine's layers are in use"
    if config.params_dtype != torch.bfloat16 and not fused.INTERPRETED:
        return f"{config.params_dtype} isn't bfloat16"
    if shape.hidden_size % 128 or shape.intermediate_size % 128 or shape.num_local_experts.bit_count() > 1:
        return "hidden or expert width isn't a multiple of 128, or the number of experts no power of two"
    return None


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph of their own; a batch in between is filled up to the next."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, most + 32, 32)]
    return sorted({min(size, most) for size in sizes})


class Step:
    """The model's weights, the engine's bookkeeping, and a graph for each size of a decoding batch."""

    def __init__(self, model: GPTModel, context: Any) -> None:
        from megatron_mixtral.fused import experts, few, norm, paged, routing  # imports triton

        self.few, self.norm, self.paged, self.experts, self.routing = few, norm, paged, experts, routing
        self.model, self.context, self.config = model, context, model.config
        size = self.config.kv_channels
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=mcore.device()) / size
        self.frequency = model.shape.rope_theta**-exponent
        self.scale = self.config.softmax_scale or size**-0.5
        self.window = self.config.window_size[0] + 1 if self.config.window_size else None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        most = context.max_requests
        self.logits = torch.empty(
            most, model.output_layer.weight.shape[0], dtype=self.config.params_dtype, device=mcore.device()
        )

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Logits [R, V] of each active request's last token."""
        context = self.context
        requests = context.total_request_count - context.paused_request_count
        if not context.is_decode_only():
            return self._prompts(context.active_token_count, requests)
        size = next((size for size in sorted(self.graphs) if size >= requests), None)
        if size is None:
            self._decode(requests)
        else:
            self.graphs[size].replay()
        return self.logits[:requests]

    @torch.inference_mode()
    def capture(self) -> None:
        """A graph for each size; the cache and the bookkeeping must be where they stay."""
        pool = torch.cuda.graph_pool_handle()
        for size in reversed(graph_sizes(self.context.max_requests)):
            self._decode(size)  # compiles what isn't yet
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                self._decode(size)
            self.graphs[size] = graph

    def _decode(self, requests: int) -> None:
        view = self.context.gpu_view
        lengths, table = view.mha_kv_seq_lengths[:requests], view.mha_block_table[:requests]

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return self.paged.decode(
                q, cache, lengths, table, view.real_token_count, scale=self.scale, window=self.window
            )

        x = self._layers(requests, attend)
        torch.mm(x, self.model.output_layer.weight.t(), out=self.logits[:requests])

    def _prompts(self, tokens: int, requests: int) -> Tensor:
        context, view = self.context, self.context.gpu_view
        bounds, lengths = view.mha_cu_query_seq_lengths[: requests + 1], view.mha_kv_seq_lengths[:requests]
        table = view.mha_block_table[:requests]
        longest = int(context.request_query_lengths[context.active()].max())

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return self.paged.prompts(
                q, cache, bounds, lengths, table, longest, scale=self.scale, window=self.window
            )

        x = self._layers(tokens, attend)
        last = view.active_request_last_token_idxs[:requests]
        return x[last] @ self.model.output_layer.weight.t()

    def _layers(self, tokens: int, attend: Attend) -> Tensor:
        """The normalised output of the last layer, [T, H]."""
        view, decoder, eps = self.context.gpu_view, self.model.decoder, self.config.layernorm_epsilon
        weights = self.model.embedding.word_embeddings.weight
        residual = F.embedding(view.token_to_input_ids[:tokens], weights)
        norms = [layer.input_layernorm.weight for layer in decoder.layers] + [decoder.final_layernorm.weight]
        x, _ = self.norm.forward(residual, norms[0], eps)
        for i, layer in enumerate(decoder.layers):
            attended = self._attention(layer.self_attention, x, self.context.memory_buffer[:, i], attend)
            x = self.few.add_and_norm(residual, attended, layer.pre_mlp_layernorm.weight, eps)
            x = self.few.add_and_norm(residual, self._experts(layer.mlp, x), norms[i + 1], eps)
        return x

    def _attention(self, attention: Any, x: Tensor, cache: Tensor, attend: Attend) -> Tensor:
        """x [T, H], cache [2, pages, positions, groups, D] -> [T, H]."""
        view, tokens = self.context.gpu_view, len(x)
        mixed = (x @ attention.linear_qkv.weight.t()).unflatten(1, (cache.shape[-2], -1))
        q = self.paged.rotate_and_store(
            mixed,
            cache,
            view.token_to_pos_ids[:tokens],
            view.token_to_block_idx[:tokens],
            view.token_to_local_position_within_kv_block[:tokens],
            view.real_token_count,
            self.frequency,
        )
        return attend(q, cache).flatten(1) @ attention.linear_proj.weight.t()

    def _experts(self, moe: Any, x: Tensor) -> Any:
        """x [T, H] -> what is added to the residual."""
        fc1, fc2 = moe.experts.linear_fc1, moe.experts.linear_fc2
        real = self.context.gpu_view.real_token_count
        choice = self.few.choose(x, moe.router.weight, self.config.moe_router_topk, real)
        if len(x) <= self.few.MOST:
            return self.few.experts(x, choice, fc1, fc2)
        plan, rows, probs = self.routing.spread_chosen(x, choice.experts, choice.probs, fc1.shape[0])
        return self.routing.gather(self.experts.forward(rows, probs, plan.counts, fc1, fc2), None, plan)[0]
