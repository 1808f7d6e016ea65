"""One forward pass of a batch by our own kernels, as a CUDA graph but for the longest prompts, at every layout.

Reads what there is to compute where it lies on the device, and writes keys and values into the cache. Ranks that
tensors are spread over have the same residual and tokens. Pipeline stages hand it on outside the graphs.

Shapes: T tokens of all requests in a row, R requests, H hidden, V vocabulary of this rank.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixtral.kernels import (
    choose_experts,
    experts,
    grouped_gemm,
    paged_attention,
    rmsnorm,
    small_batch,
    vocabulary,
)
from megatron_mixtral.mcore import ranks
from megatron_mixtral.model.layers import window_of
from megatron_mixtral.serve.engine.batch import Batch
from megatron_mixtral.serve.engine.exchange import Replicas, Stage, Sum, Vocabulary

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

Attend = Callable[[Tensor, Tensor], Tensor]


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


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step is about, where the host has to know it."""

    requests: int
    tokens: int
    prompts: bool
    scored: Tensor | None = None  # tokens whose logits are wanted as well, by their place in the batch


class Step:
    """The stage's weights, the batch, the cache, and a graph for each size of a batch.

    cache [2, layers, pages, positions, groups, D].
    """

    def __init__(self, model: GPTModel, batch: Batch, cache: Tensor) -> None:
        self.model, self.batch, self.cache, self.config = model, batch, cache, model.config
        size = self.config.kv_channels
        exponent = torch.arange(0, size, 2, dtype=torch.float32, device=ranks.device()) / size
        self.frequency = model.shape.rope_theta**-exponent
        self.scale = self.config.softmax_scale or size**-0.5
        self.window = window_of(self.config)
        self.graphs: dict[int, Any] = {}  # of decoding, by requests
        self.prompt_graphs: dict[int, Any] = {}  # of prompts among them, by tokens
        self.stage, self.head = Stage(), _head(model)
        self._meet(model)
        kind = {"dtype": self.config.params_dtype, "device": ranks.device()}
        self.residual = torch.zeros(batch.tokens, self.config.hidden_size, **kind)
        self.logits = torch.empty(batch.requests, self.words.count, **kind)
        self.tokens = torch.zeros(batch.requests, dtype=torch.int32, device=ranks.device())
        self.real = batch.real.new_zeros(self.replicas.count)
        self._normed: Tensor | None = None

    def _meet(self, model: GPTModel) -> None:
        """With all ranks that a step is shared with."""
        state, own = parallel_state, model.decoder.layers[0].mlp.experts
        tensor, together = (
            state.get_tensor_model_parallel_group(),
            state.get_expert_tensor_and_model_parallel_group(),
        )
        sizes = {"tokens": self.batch.tokens, "width": self.config.hidden_size, "dtype": self.config.params_dtype}
        self.replicas = Replicas(together)
        self.sum = Sum(tensor, **sizes)
        same = dist.get_process_group_ranks(tensor) == dist.get_process_group_ranks(together)
        self.sum_of_experts = self.sum if same or self.replicas.count > 1 else Sum(together, **sizes)
        self.first_expert = own.expert_group.rank() * len(own.linear_fc1)
        self.words = Vocabulary(model.vocab_size, model.shape.vocab_size, requests=self.batch.requests)

    @torch.inference_mode()
    def run(self, work: Work) -> None:
        """The likeliest token of each row that draws goes to `tokens` and its slot, on every rank."""
        prompts, requests, tokens = self._agreed(work)
        graphs = self.prompt_graphs if prompts else self.graphs
        size = _filled_up(tokens, graphs)
        self.stage.receive(self.residual[:size])
        if size in graphs and work.scored is None:
            graphs[size].replay()
        elif prompts:
            self._prompts(size, requests)
        else:
            self._decode(size)
        self.stage.send(self.residual[:size])
        if not self.stage.alone:
            self.stage.share(self.tokens[:requests])
            self.batch.drawn.index_copy_(0, self.batch.slots[:requests].long(), self.tokens[:requests])

    def _agreed(self, work: Work) -> tuple[bool, int, int]:
        """Whether there are prompts, requests and tokens: of all replicas that share experts."""
        most = self.batch.requests
        prompts, tokens = self.replicas.agree(int(work.prompts or work.scored is not None), work.tokens)
        prompts = bool(prompts) or tokens > most
        return prompts, most if self.replicas.count > 1 else work.requests, max(tokens, 1)

    def logits_of(self, rows: Tensor) -> Tensor:
        """Of rows of the last step, on every rank, [n, all words]."""
        part = self.logits[rows]
        self.stage.share(part)
        return self.words.whole(part)

    def scores_of(self, tokens: Tensor) -> Tensor:
        """Logits after tokens of the last step, whose places in the batch were in `Work.scored`; [n, all words]."""
        if self.head is None or self._normed is None:
            part = self.logits.new_empty(len(tokens), self.words.count)
        else:
            part = self._normed[tokens] @ self.head.t()
        self.stage.share(part)
        return self.words.whole(part)

    @torch.inference_mode()
    def capture(self) -> None:
        """A graph for each size; the cache and the batch must be where they stay."""
        self.stage.receive(self.residual[:1])  # the first time, the ranks' connections are made
        self.stage.send(self.residual[:1])
        self.stage.share(self.tokens[:1])
        most, pool, largest = self.batch.requests, torch.cuda.graph_pool_handle(), self._largest_graph()
        for size in reversed([size for size in PROMPT_SIZES if size <= min(self.batch.tokens, largest)]):
            self.prompt_graphs[size] = _captured(partial(self._prompts, size, most), pool)
        for size in reversed([size for size in graph_sizes(most) if size <= largest]):
            self.graphs[size] = _captured(partial(self._decode, size), pool)

    def close(self) -> None:
        """Lets go of the graphs: a group of ranks can't be left while collectives of its own are in one."""
        self.graphs.clear()
        self.prompt_graphs.clear()

    def _largest_graph(self) -> float:
        """Tokens beyond which experts may ask the host for counts, which no graph can."""
        own = self.model.decoder.layers[0].mlp.experts
        weights = own.linear_fc1, own.linear_fc2
        serve = grouped_gemm.tiles_serve(*weights)
        return float("inf") if serve else small_batch.most(*weights) / self.replicas.count

    def _decode(self, requests: int) -> None:
        batch = self.batch
        lengths, table = batch.lengths[:requests], batch.table[:requests]

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return paged_attention.decode(
                q, cache, lengths, table, batch.real, scale=self.scale, window=self.window
            )

        self._draw(self._layers(requests, attend), requests)

    def _prompts(self, tokens: int, requests: int) -> None:
        """`requests` at most; how many there are and which tokens count lies on the device."""
        batch = self.batch
        cut = paged_attention.cut(batch.bounds, batch.real, tokens, requests)

        def attend(q: Tensor, cache: Tensor) -> Tensor:
            return paged_attention.prompts(
                q, cache, batch.bounds, batch.lengths, batch.table, cut, scale=self.scale, window=self.window
            )

        self._normed = self._layers(tokens, attend)
        self._draw(self._normed[batch.last[:requests].clamp(0, tokens - 1)], requests)

    def _draw(self, x: Tensor, requests: int) -> None:
        """x [R, H], the last tokens' -> logits and the likeliest followers."""
        if self.head is not None:
            logits = torch.mm(x, self.head.t(), out=self.logits[:requests])
            self.words.likeliest(logits, self.batch.slots[:requests], self.batch.drawn, self.tokens[:requests])

    def _layers(self, tokens: int, attend: Attend) -> Tensor:
        """Takes the residual through the stage's layers, [T, H]; returns it, or after the last its norm."""
        decoder, eps = self.model.decoder, self.config.layernorm_epsilon
        residual = self.residual[:tokens]
        if self.replicas.count > 1:
            self.real.copy_(self.replicas.gather(self.batch.real))
        norms = [layer.input_layernorm.weight for layer in decoder.layers]
        norms.append(decoder.final_layernorm.weight if self.stage.last else None)
        x = self._begin(residual, norms[0], eps)
        for i, layer in enumerate(decoder.layers):
            attended = self._attention(layer.self_attention, x, self.cache[:, i], attend)
            x = self.sum.add_and_norm(residual, attended, layer.pre_mlp_layernorm.weight, eps)
            x = self._experts(layer.mlp, x, residual, norms[i + 1])
        return x

    def _begin(self, residual: Tensor, norm: Tensor, eps: float) -> Tensor:
        """The first layer's input; on the first stage the residual becomes the tokens' embeddings."""
        if not self.stage.first:
            return rmsnorm.forward(residual, norm, eps)[0]
        words, batch = self.model.embedding.word_embeddings.weight, self.batch
        ids = batch.ids[: len(residual)]
        if self.words.ranks == 1:
            vocabulary.look_up(ids, batch.drawn, words, residual)
            return rmsnorm.forward(residual, norm, eps)[0]
        part = vocabulary.look_up(ids, batch.drawn, words, torch.empty_like(residual), self.words.first)
        residual.zero_()
        return self.sum.add_and_norm(residual, part, norm, eps)

    def _attention(self, attention: Any, x: Tensor, cache: Tensor, attend: Attend) -> Tensor:
        """x [T, H], cache [2, pages, positions, groups, D] -> [T, H], this rank's part of the sum."""
        batch, tokens = self.batch, len(x)
        mixed = (x @ attention.linear_qkv.weight.t()).unflatten(1, (cache.shape[-2], -1))
        position, page, offset = (column[:tokens] for column in (batch.position, batch.page_of, batch.offset))
        q = paged_attention.rotate_and_store(mixed, cache, position, page, offset, batch.real, self.frequency)
        return attend(q, cache).flatten(1) @ attention.linear_proj.weight.t()

    def _experts(self, moe: Any, x: Tensor, residual: Tensor, norm: Tensor | None) -> Tensor:
        """x [T, H] -> the residual with what experts add to it, after its norm."""
        eps = self.config.layernorm_epsilon
        if self.replicas.count == 1:
            return self.sum_of_experts.add_and_norm(residual, self._expert_rows(moe, x, self.batch.real), norm, eps)
        everyones = self.replicas.gather(x)
        added = torch.zeros_like(everyones)
        small_batch.add_and_norm(added, self._expert_rows(moe, everyones, self.real), None, eps)
        return small_batch.add_and_norm(residual, self.replicas.summed(added), norm, eps)

    def _expert_rows(self, moe: Any, x: Tensor, real: Tensor) -> small_batch.Rows:
        """What this rank's experts have for x [T, H]."""
        fc1, fc2, scales = moe.experts.linear_fc1, moe.experts.linear_fc2, moe.experts.scales
        chosen = choose_experts.choose(x, moe.router.weight, self.config.moe_router_topk, real)
        order = choose_experts.sort(chosen, len(fc1), self.first_expert)
        if len(x) <= small_batch.most(fc1, fc2):
            return small_batch.experts(x, chosen, order, fc1, fc2, scales)
        rows, probs = choose_experts.spread(x, chosen, order)
        out = experts.forward(rows, probs, grouped_gemm.best_forward(order.ends, fc1, fc2), fc1, fc2, scales)
        return small_batch.Rows(parts=out.unsqueeze(0), place=order.place)
