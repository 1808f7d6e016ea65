"""One forward pass of the engine's batch by our own kernels, as a CUDA graph but for the longest prompts.

Reads the engine's bookkeeping where it lies on the device and writes keys and values into the engine's cache, so
the two can take turns on any request. Each pipeline stage hands its residual on, outside the graphs, and the last
one the logits to all. Shapes: T tokens of all requests in a row, R requests, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixtral import kernels
from megatron_mixtral.kernels import grouped_gemm
from megatron_mixtral.mcore import compat, ranks
from megatron_mixtral.model.layers import Experts, window_of

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

Attend = Callable[[Tensor, Tensor], Tensor]


def missing(model: GPTModel) -> str | None:
    """Why the engine's own forward pass is used for `model`; None when ours can be."""
    if reason := kernels.missing():
        return reason
    if not compat.ENGINE_COUNTS_ON_DEVICE:
        return f"megatron-core {compat.VERSION[0]}.{compat.VERSION[1]} keeps its bookkeeping elsewhere"
    state = parallel_state
    if state.get_tensor_model_parallel_world_size() * state.get_expert_model_parallel_world_size() > 1:
        return "tensors or experts are spread over ranks"
    config, shape = model.config, model.shape
    if not isinstance(model.decoder.layers[0].mlp.experts, Experts):
        return "Transformer Engine's layers are in use"
    if config.params_dtype != torch.bfloat16 and not kernels.INTERPRETED:
        return f"{config.params_dtype} isn't bfloat16"
    if shape.hidden_size % 128 or shape.intermediate_size % 128 or shape.num_local_experts.bit_count() > 1:
        return "hidden or expert width isn't a multiple of 128, or the number of experts no power of two"
    return None


def _head(model: GPTModel) -> Tensor | None:
    """What makes logits of the last layer's output, [V, H]; it may be the embedding. None before the last stage."""
    if not model.post_process:
        return None
    if model.share_embeddings_and_output_weights:
        return model.shared_embedding_or_output_weight()
    return model.output_layer.weight


def graph_sizes(most: int) -> list[int]:
    """Batch sizes that get a graph of their own; a batch in between is filled up to the next."""
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, most + 32, 32)]
    return sorted({min(size, most) for size in sizes})


# Tokens of a batch with prompts that get a graph; beyond, the GPU has more to do than the host has to launch.
PROMPT_SIZES = [16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024]


class Stage:
    """This rank's place in the pipeline that every batch passes through; without one, first and last at once."""

    def __init__(self) -> None:
        state = parallel_state
        self.group = state.get_pipeline_model_parallel_group()
        self.first, self.last = state.is_pipeline_first_stage(), state.is_pipeline_last_stage()
        self.before, self.behind, self.end = (
            state.get_pipeline_model_parallel_prev_rank(),
            state.get_pipeline_model_parallel_next_rank(),
            state.get_pipeline_model_parallel_last_rank(),
        )

    def receive(self, residual: Tensor) -> None:
        if not self.first:
            dist.recv(residual, self.before, group=self.group)

    def send(self, residual: Tensor) -> None:
        if not self.last:
            dist.send(residual, self.behind, group=self.group)

    def share(self, logits: Tensor) -> None:
        """Every stage draws the same tokens from the last one's."""
        if not (self.first and self.last):
            dist.broadcast(logits, self.end, group=self.group)


def _filled_up(size: int, graphs: Iterable[int]) -> int:
    """The next size that has a graph, or `size` itself."""
    return min((other for other in graphs if other >= size), default=size)


def _captured(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    run()  # compiles what isn't yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events in its own thread, which only breaks graphs of all threads.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph


class Step:
    """The stage's weights, the engine's bookkeeping, and a graph for each size of a batch."""

    def __init__(self, model: GPTModel, context: Any) -> None:
        from megatron_mixtral.kernels import (  # imports triton
            choose_experts,
            experts,
            paged_attention,
            rmsnorm,
            small_batch,
        )

        self.choice, self.experts, self.few, self.norm, self.paged = (
            choose_experts,
            experts,
            small_batch,
            rmsnorm,
            paged_attention,
        )
        self.model, self.context, self.config = model, context, model.config
        size = self.config.kv_channels
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=ranks.device()) / size
        self.frequency = model.shape.rope_theta**-exponent
        self.scale = self.config.softmax_scale or size**-0.5
        self.window = window_of(self.config)
        self.stage, self.head = Stage(), _head(model)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # of decoding, by requests
        self.prompt_graphs: dict[int, torch.cuda.CUDAGraph] = {}  # of prompts among them, by tokens
        kind = {"dtype": self.config.params_dtype, "device": ranks.device()}
        self.residual = torch.zeros(context.max_tokens, self.config.hidden_size, **kind)
        self.logits = torch.empty(context.max_requests, model.vocab_size, **kind)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Logits [R, V] of each active request's last token, on every stage."""
        context = self.context
        requests = context.total_request_count - context.paused_request_count
        decodes = context.is_decode_only()
        graphs = self.graphs if decodes else self.prompt_graphs
        tokens = _filled_up(requests if decodes else context.active_token_count, graphs)
        self.stage.receive(self.residual[:tokens])
        if tokens in graphs:
            graphs[tokens].replay()
        elif decodes:
            self._decode(tokens)
        else:
            self._prompts(tokens, requests)
        self.stage.send(self.residual[:tokens])
        self.stage.share(self.logits[:requests])
        return self.logits[:requests]

    @torch.inference_mode()
    def capture(self) -> None:
        """A graph for each size; the cache and the bookkeeping must be where they stay."""
        self.stage.receive(self.residual[:1])  # the first time, the ranks' connections are made
        self.stage.send(self.residual[:1])
        self.stage.share(self.logits[:1])
        most, pool, largest = self.context.max_requests, torch.cuda.graph_pool_handle(), self._largest_graph()
        for size in reversed([size for size in PROMPT_SIZES if size <= min(self.context.max_tokens, largest)]):
            self.prompt_graphs[size] = _captured(partial(self._prompts, size, most), pool)
        for size in reversed([size for size in graph_sizes(most) if size <= largest]):
            self.graphs[size] = _captured(partial(self._decode, size), pool)

    def _largest_graph(self) -> float:
        """Tokens beyond which experts may ask the host for counts, which no graph can."""
        experts = self.model.decoder.layers[0].mlp.experts
        weights = experts.linear_fc1, experts.linear_fc2
        return float("inf") if grouped_gemm.tiles_serve(*weights) else self.few.most(*weights)

    def _decode(self, requests: int) -> None:
        view = self.context.gpu_view
        lengths, table = view.mha_kv_seq_lengths[:requests], view.mha_block_table[:requests]

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return self.paged.decode(
                q, cache, lengths, table, view.real_token_count, scale=self.scale, window=self.window
            )

        x = self._layers(requests, attend)
        if self.head is not None:
            torch.mm(x, self.head.t(), out=self.logits[:requests])

    def _prompts(self, tokens: int, requests: int) -> None:
        """`requests` at most; how many there are and which tokens count lies on the device."""
        view = self.context.gpu_view
        bounds, lengths, table = view.mha_cu_query_seq_lengths, view.mha_kv_seq_lengths, view.mha_block_table
        cut = self.paged.cut(bounds, view.real_token_count, tokens, requests)

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return self.paged.prompts(q, cache, bounds, lengths, table, cut, scale=self.scale, window=self.window)

        x = self._layers(tokens, attend)
        if self.head is not None:
            last = view.active_request_last_token_idxs[:requests].clamp(0, tokens - 1)
            torch.mm(x[last], self.head.t(), out=self.logits[:requests])

    def _layers(self, tokens: int, attend: Attend) -> Tensor:
        """Takes the residual through the stage's layers, [T, H]; returns it, or after the last its norm."""
        view, decoder, eps = self.context.gpu_view, self.model.decoder, self.config.layernorm_epsilon
        residual = self.residual[:tokens]
        if self.stage.first:
            words = self.model.embedding.word_embeddings.weight
            torch.index_select(words, 0, view.token_to_input_ids[:tokens], out=residual)
        norms = [layer.input_layernorm.weight for layer in decoder.layers]
        norms.append(decoder.final_layernorm.weight if self.stage.last else None)
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
        fc1, fc2, scales = moe.experts.linear_fc1, moe.experts.linear_fc2, moe.experts.scales
        real = self.context.gpu_view.real_token_count
        chosen = self.choice.choose(x, moe.router.weight, self.config.moe_router_topk, real)
        order = self.choice.sort(chosen, len(fc1))
        if len(x) <= self.few.most(fc1, fc2):
            return self.few.experts(x, chosen, order, fc1, fc2, scales)
        rows, probs = self.choice.spread(x, chosen, order)
        out = self.experts.forward(rows, probs, grouped_gemm.best_forward(order.ends, fc1, fc2), fc1, fc2, scales)
        return self.few.Rows(parts=out.unsqueeze(0), place=order.place)
