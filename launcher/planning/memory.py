"""The memory that a job needs on one GPU of each stage, by arithmetic alone (pure). docs/memory.md has every term.

Bytes everywhere. Letters: H hidden, Q width of all queries, K width of all keys, F expert width, k experts a token,
V vocabulary, T the tokens of one micro batch that one rank keeps.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import CACHE_SHARE, PAGE, PROMPT_STEP, FinetuneConfig, ServeConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape

GIB = 2**30
BYTES = {"bf16": 2, "fp32": 4}
OUTSIDE = 2 * GIB  # CUDA's context, NCCL's buffers, and the gaps between what torch has taken from the driver
TIGHT = 0.9  # share of a GPU above which the estimate's error matters


@dataclass(frozen=True, kw_only=True)
class TrainingWork:
    """What of finetune's options decides memory and time, by their names."""

    sequence_length: int
    micro_batch: int
    global_batch: int
    precision: str = "bf16"
    recompute: str = "none"
    lora: int = 0
    lora_experts: bool = False
    first_stage_layers: int = 0
    last_stage_layers: int = 0
    virtual_pipeline: int = 1

    @classmethod
    def of(cls, config: FinetuneConfig) -> "TrainingWork":
        """What `config` asks for."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def stages(self, shape: MixtralShape, layout: Layout) -> tuple[int, ...]:
        """Layers of each pipeline stage."""
        return layout.stages(shape.num_hidden_layers, self.first_stage_layers, self.last_stage_layers)


@dataclass(frozen=True, kw_only=True)
class ServingWork:
    """What of serve's options decides memory, by their names."""

    max_batch: int
    max_tokens: int
    precision: str = "bf16"
    fp8_experts: bool = False

    @classmethod
    def of(cls, chosen: Mapping[str, Any], shape: MixtralShape | None) -> "ServingWork":
        """What was chosen. A model whose context is shorter than the default serves its context."""
        config = checks.complete(ServeConfig, chosen)
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
        if "max_tokens" not in chosen and shape:
            values["max_tokens"] = min(config.max_tokens, shape.max_position_embeddings)
        return cls(**values)

    @property
    def pages(self) -> int:
        """Pages of one request at its longest."""
        return -(-self.max_tokens // PAGE)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the whole cache that the server asks for; one page is padding's."""
        return (self.max_batch * self.pages + 1) * PAGE


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One pipeline stage's GPU: `parts` by name, in the order of docs/memory.md."""

    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def parameters(shape: MixtralShape, layout: Layout, stage: int, stages: tuple[int, ...] = ()) -> tuple[int, int]:
    """(dense, of experts): numbers that one rank of `stage` holds; `stages` where layers aren't shared evenly."""
    layers, hidden = (stages or layout.stages(shape.num_hidden_layers))[stage], shape.hidden_size
    queries, keys = shape.query_width, shape.key_width
    attention = hidden * (queries + 2 * keys + queries) // layout.tensor
    dense = layers * (attention + 2 * hidden + shape.num_local_experts * hidden)
    table = layout.padded_vocabulary(shape) // layout.tensor * hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    dense += table * (first + last - (first and last and shape.tie_word_embeddings)) + hidden * last
    width = shape.intermediate_size // layout.expert_tensor
    return dense, layers * (shape.num_local_experts // layout.expert) * 3 * hidden * width


def adapters(shape: MixtralShape, layout: Layout, work: TrainingWork, layers: int) -> tuple[int, int]:
    """The same for adapters: each matrix [out, in] has a pair, rank x in and out x rank, divided like it."""
    hidden, tensor = shape.hidden_size, layout.tensor
    queries, keys = shape.query_width, shape.key_width
    attention = 3 * hidden + (queries + 2 * keys) // tensor + queries // tensor + hidden
    width = shape.intermediate_size // layout.expert_tensor
    expert = (hidden + 2 * width) + (width + hidden) if work.lora_experts else 0
    return layers * work.lora * attention, layers * (shape.num_local_experts // layout.expert) * work.lora * expert


def training(shape: MixtralShape, layout: Layout, world: int, work: TrainingWork) -> tuple[Usage, ...]:
    """Of each pipeline stage, at the moment of a step when it holds most."""
    layers = work.stages(shape, layout)
    return tuple(_training_stage(shape, layout, world, work, layers, stage) for stage in range(layout.pipeline))


def _training_stage(
    shape: MixtralShape, layout: Layout, world: int, work: TrainingWork, layers: tuple[int, ...], stage: int
) -> Usage:
    size = BYTES[work.precision]
    held = trained = parameters(shape, layout, stage, layers)
    if work.lora:
        trained = adapters(shape, layout, work, layers[stage])
        held = (held[0] + trained[0], held[1] + trained[1])
    shards = trained[0] / (world // (layout.tensor * layout.pipeline))
    shards += trained[1] / (world // (layout.expert_tensor * layout.expert * layout.pipeline))
    state = 8 if work.precision == "fp32" else 12  # two moments; bf16 weights also have a copy in fp32
    data = world // (layout.tensor * layout.pipeline * layout.context)
    under_way = in_flight(layout, work.global_batch // (work.micro_batch * data), work.virtual_pipeline, stage)
    kept, working = _activations(shape, layout, work, layers[stage], under_way)
    parts = {
        "weights": size * sum(held),
        "gradients": 4 * sum(trained),
        "optimizer": round(state * shards),
        "activations": kept,
        "backward": working,
    }
    if stage == layout.pipeline - 1:
        logits = tokens_kept(layout, work) * size * (layout.padded_vocabulary(shape) + 2 * shape.hidden_size)
        # Recomputing the last layer uses their memory again.
        parts["logits"] = max(0, logits - working) if work.recompute == "full" else logits
    return Usage(stage=stage, parts=parts)


def tokens_kept(layout: Layout, work: TrainingWork) -> int:
    """T: a micro batch's tokens on one rank. Sequence parallelism goes with TP."""
    return work.micro_batch * work.sequence_length // (layout.context * layout.tensor)


def in_flight(layout: Layout, micro_batches: int, chunks: int, stage: int) -> int:
    """Micro batches whose forward pass is done and whose backward pass isn't, under one-forward-one-backward.

    Where stages work on several chunks in turn each chunk counts by itself.
    """
    behind = layout.pipeline - stage - 1
    if chunks == 1:
        return min(behind + 1, micro_batches)
    return min(2 * behind + (chunks - 1) * layout.pipeline + 1, chunks * micro_batches)


def _activations(
    shape: MixtralShape, layout: Layout, work: TrainingWork, layers: int, under_way: int
) -> tuple[int, int]:
    """(kept for the backward pass, in use during it besides) of a stage with so many micro batches in flight."""
    a_number = tokens_kept(layout, work) * BYTES[work.precision]
    layers = layers // work.virtual_pipeline * under_way
    sent = under_way if work.virtual_pipeline > 1 else 0  # a chunk's output is kept until its backward pass
    hidden, width, chosen = shape.hidden_size, shape.intermediate_size, shape.num_experts_per_tok
    queries, keys = shape.query_width, shape.key_width
    # Both norms' inputs, q, k, v, attention's output and the norm's.
    attention = 3 * hidden + 2 * queries + 2 * keys
    kept = 3 if work.lora_experts else 2  # widths a row: gate and up, and with adapters what goes into the second
    experts = hidden + chosen * (hidden * layout.expert_tensor + kept * width)  # the norm's output, rows
    backward = chosen * width * (5 if work.lora_experts else 1) + 2 * hidden  # plain torch keeps every step of it
    if layout.expert * layout.expert_tensor > 1:
        backward += 2 * chosen * hidden  # rows sent to and received from other ranks
    whole = attention + experts
    if work.recompute == "full":
        return a_number * (layers + sent) * hidden, a_number * (whole + backward)
    return a_number * (layers * whole + sent * hidden), a_number * backward


def serving(shape: MixtralShape, layout: Layout, work: ServingWork, tokens: int | None = None) -> tuple[Usage, ...]:
    """Of each pipeline stage, with a cache of so many tokens, or else with all that is asked for."""
    cached = work.cache_tokens if tokens is None else tokens
    return tuple(_serving_stage(shape, layout, work, cached, stage) for stage in range(layout.pipeline))


def _serving_stage(shape: MixtralShape, layout: Layout, work: ServingWork, tokens: int, stage: int) -> Usage:
    size = BYTES[work.precision]
    a_prompt = max(PROMPT_STEP, work.max_batch) * size
    hidden, queries, keys = shape.hidden_size, shape.query_width, shape.key_width
    layer = 3 * hidden + (2 * queries + 2 * keys) // layout.tensor
    rows = shape.num_experts_per_tok * (2 * hidden + 3 * shape.intermediate_size // layout.expert_tensor)
    dense, experts = parameters(shape, layout, stage)
    if work.fp8_experts:  # a byte each, and a scale in fp32 for every row of both matrices
        own = layout.stages(shape.num_hidden_layers)[stage] * shape.num_local_experts // layout.expert
        experts += 4 * own * (2 * shape.intermediate_size // layout.expert_tensor + hidden)
    else:
        experts *= size
    parts = {
        "weights": size * dense + experts,
        "a step": a_prompt * (layer + rows),
        "KV cache": tokens * cache_bytes(shape, layout, work.precision, stage),
    }
    if stage == layout.pipeline - 1:
        parts["a step"] += work.max_batch * shape.vocab_size * 4
    return Usage(stage=stage, parts=parts)


def cache_bytes(shape: MixtralShape, layout: Layout, precision: str, stage: int) -> int:
    """Keys and values of one token on one rank of `stage`."""
    layers = layout.stages(shape.num_hidden_layers)[stage]
    return 2 * layers * shape.num_key_value_heads // layout.tensor * shape.head_dim * BYTES[precision]


def cache_room(shape: MixtralShape, layout: Layout, work: ServingWork, gpu: float) -> int:
    """Tokens that the cache holds on the fullest GPU of `gpu` bytes; negative if the weights don't fit."""
    return min(
        int((gpu - OUTSIDE - usage.parts["weights"] - usage.parts["a step"]) * CACHE_SHARE)
        // cache_bytes(shape, layout, work.precision, usage.stage)
        for usage in serving(shape, layout, work)
    )
