"""What one GPU of a job has to hold, stage by stage, by arithmetic alone (pure); docs/memory.md has every term.

Bytes everywhere. Letters: H hidden, Q width of all queries, K width of all keys, F expert width, k experts a token,
V vocabulary, T the tokens of one micro batch that one rank keeps.
"""

from dataclasses import dataclass

from launcher.planning.layout import Layout, Shape

GIB = 2**30
BYTES = {"bf16": 2, "fp32": 4}
OUTSIDE = 2 * GIB  # CUDA's context, NCCL's buffers, and the gaps between what torch has taken from the driver
TIGHT = 0.9  # of a GPU: beyond it the estimate's own error decides
PAGE = 256  # tokens of the server's cache that come and go together
PROMPT_STEP = 2048  # tokens that the server reads at once
CACHE_SHARE = 0.85  # of what the weights leave


@dataclass(frozen=True, kw_only=True)
class Training:
    """What `finetune` computes. `micro_batches` are those that one replica does in a step."""

    sequence: int
    micro_batch: int
    micro_batches: int
    precision: str = "bf16"
    recompute: str = "none"
    lora: int = 0  # rank of the adapters that are trained alone; 0: everything is
    lora_experts: bool = False
    stages: tuple[int, ...] = ()  # layers of each, where they aren't shared out evenly
    virtual_pipeline: int = 1  # chunks of layers that each stage works on in turn


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What `serve` holds at once, as in its settings."""

    requests: int
    tokens: int
    precision: str = "bf16"
    fp8_experts: bool = False

    @property
    def pages(self) -> int:
        """Pages of one request at its longest."""
        return -(-self.tokens // PAGE)

    @property
    def cache_tokens(self) -> int:
        """Tokens of the whole cache that the server asks for; one page is padding's."""
        return (self.requests * self.pages + 1) * PAGE


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One pipeline stage's GPU: `parts` by name, in the order of docs/memory.md."""

    stage: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


def padded_vocabulary(shape: Shape, layout: Layout) -> int:
    """Rows of the embedding: as few more than the vocabulary as make it divide over TP."""
    return -(-shape.vocabulary // layout.tensor) * layout.tensor


def parameters(shape: Shape, layout: Layout, stage: int, stages: tuple[int, ...] = ()) -> tuple[int, int]:
    """(dense, of experts): numbers that one rank of `stage` holds."""
    layers, hidden = (stages or shape.stages(layout.pipeline))[stage], shape.hidden
    queries, keys = shape.queries, shape.keys
    attention = hidden * (queries + 2 * keys + queries) // layout.tensor
    dense = layers * (attention + 2 * hidden + shape.experts * hidden)
    table = padded_vocabulary(shape, layout) // layout.tensor * hidden
    first, last = stage == 0, stage == layout.pipeline - 1
    dense += table * (first + last - (first and last and shape.tied)) + hidden * last
    width = shape.expert_width // layout.expert_tensor
    return dense, layers * (shape.experts // layout.expert) * 3 * hidden * width


def adapters(shape: Shape, layout: Layout, work: Training, stage: int) -> tuple[int, int]:
    """The same of adapters: each matrix [out, in] has a pair of rank x in and out x rank, cut as it is."""
    layers, hidden, tensor = _layers(shape, layout, work, stage), shape.hidden, layout.tensor
    queries, keys = shape.queries, shape.keys
    attention = 3 * hidden + (queries + 2 * keys) // tensor + queries // tensor + hidden
    width = shape.expert_width // layout.expert_tensor
    expert = (hidden + 2 * width) + (width + hidden) if work.lora_experts else 0
    return layers * work.lora * attention, layers * (shape.experts // layout.expert) * work.lora * expert


def training(shape: Shape, layout: Layout, world: int, work: Training) -> tuple[Usage, ...]:
    """Of each pipeline stage, at the moment of a step when it holds most."""
    return tuple(_training_stage(shape, layout, world, work, stage) for stage in range(layout.pipeline))


def _training_stage(shape: Shape, layout: Layout, world: int, work: Training, stage: int) -> Usage:
    size = BYTES[work.precision]
    held = trained = parameters(shape, layout, stage, work.stages)
    if work.lora:
        trained = adapters(shape, layout, work, stage)
        held = (held[0] + trained[0], held[1] + trained[1])
    shards = trained[0] / (world // (layout.tensor * layout.pipeline))
    shards += trained[1] / (world // (layout.expert_tensor * layout.expert * layout.pipeline))
    state = 8 if work.precision == "fp32" else 12  # two moments; bf16 weights have a twin in fp32 as well
    kept, working = _activations(shape, layout, work, stage)
    parts = {
        "weights": size * sum(held),
        "gradients": 4 * sum(trained),
        "optimizer": round(state * shards),
        "activations": kept,
        "backward": working,
    }
    if stage == layout.pipeline - 1:
        logits = tokens_kept(layout, work) * size * (padded_vocabulary(shape, layout) + 2 * shape.hidden)
        # Their memory serves again when the last layer is computed once more.
        parts["logits"] = max(0, logits - working) if work.recompute == "full" else logits
    return Usage(stage=stage, parts=parts)


def _layers(shape: Shape, layout: Layout, work: Training, stage: int) -> int:
    return (work.stages or shape.stages(layout.pipeline))[stage]


def tokens_kept(layout: Layout, work: Training) -> int:
    """T: a micro batch's tokens on one rank. Sequence parallelism goes with TP."""
    return work.micro_batch * work.sequence // (layout.context * layout.tensor)


def in_flight(layout: Layout, work: Training, stage: int) -> int:
    """Micro batches whose forward pass is done and whose backward pass isn't, under one-forward-one-backward.

    Where stages work on several chunks in turn each chunk counts by itself.
    """
    behind, chunks = layout.pipeline - stage - 1, work.virtual_pipeline
    if chunks == 1:
        return min(behind + 1, work.micro_batches)
    return min(2 * behind + (chunks - 1) * layout.pipeline + 1, chunks * work.micro_batches)


def _activations(shape: Shape, layout: Layout, work: Training, stage: int) -> tuple[int, int]:
    """(kept for the backward pass, in use during it besides) of one stage."""
    a_number = tokens_kept(layout, work) * BYTES[work.precision]
    under_way = in_flight(layout, work, stage)
    layers = _layers(shape, layout, work, stage) // work.virtual_pipeline * under_way
    sent = under_way if work.virtual_pipeline > 1 else 0  # what a chunk hands on stays until it comes back
    hidden, width, chosen = shape.hidden, shape.expert_width, shape.experts_a_token
    queries, keys = shape.queries, shape.keys
    # Both norms' inputs, q, k, v, attention's output and the norm's.
    attention = 3 * hidden + 2 * queries + 2 * keys
    kept = 3 if work.lora_experts else 2  # widths a row: gate and up, and with adapters what goes into the second
    experts = hidden + chosen * (hidden * layout.expert_tensor + kept * width)  # the norm's output, rows
    backward = chosen * width * (5 if work.lora_experts else 1) + 2 * hidden  # plain torch keeps every step of it
    if layout.expert * layout.expert_tensor > 1:
        backward += 2 * chosen * hidden  # rows on their way to and from other ranks
    whole = attention + experts
    if work.recompute == "full":
        return a_number * (layers + sent) * hidden, a_number * (whole + backward)
    return a_number * (layers * whole + sent * hidden), a_number * backward


def serving(shape: Shape, layout: Layout, work: Serving, tokens: int | None = None) -> tuple[Usage, ...]:
    """Of each pipeline stage, with a cache of so many tokens, or else with all that is asked for."""
    cached = work.cache_tokens if tokens is None else tokens
    return tuple(_serving_stage(shape, layout, work, cached, stage) for stage in range(layout.pipeline))


def _serving_stage(shape: Shape, layout: Layout, work: Serving, tokens: int, stage: int) -> Usage:
    size = BYTES[work.precision]
    a_prompt = max(PROMPT_STEP, work.requests) * size
    hidden, queries, keys = shape.hidden, shape.queries, shape.keys
    layer = 3 * hidden + (2 * queries + 2 * keys) // layout.tensor
    rows = shape.experts_a_token * (2 * hidden + 3 * shape.expert_width // layout.expert_tensor)
    dense, experts = parameters(shape, layout, stage)
    if work.fp8_experts:  # a byte each, and a scale in fp32 for every row of both matrices
        own = shape.stages(layout.pipeline)[stage] * shape.experts // layout.expert
        experts += 4 * own * (2 * shape.expert_width // layout.expert_tensor + hidden)
    else:
        experts *= size
    parts = {
        "weights": size * dense + experts,
        "a step": a_prompt * (layer + rows),
        "KV cache": tokens * cache_bytes(shape, layout, work.precision, stage),
    }
    if stage == layout.pipeline - 1:
        parts["a step"] += work.requests * shape.vocabulary * 4
    return Usage(stage=stage, parts=parts)


def cache_bytes(shape: Shape, layout: Layout, precision: str, stage: int) -> int:
    """Keys and values of one token on one rank of `stage`."""
    layers = shape.stages(layout.pipeline)[stage]
    return 2 * layers * shape.query_groups // layout.tensor * shape.head_size * BYTES[precision]


def cache_room(shape: Shape, layout: Layout, work: Serving, gpu: float) -> int:
    """Tokens that the cache holds on the fullest GPU of `gpu` bytes; less than none where weights don't fit."""
    return min(
        int((gpu - OUTSIDE - usage.parts["weights"] - usage.parts["a step"]) * CACHE_SHARE)
        // cache_bytes(shape, layout, work.precision, usage.stage)
        for usage in serving(shape, layout, work)
    )
