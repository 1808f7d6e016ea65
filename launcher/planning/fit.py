"""Whether a job can run where it is meant to, before the queue says no: arithmetic, memory, bubble, fabric (pure).

`study` raises `LayoutError` with the equation for what can't be; what only the memory estimate speaks against is in
`Outlook.shortage`, which a user may overrule.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from launcher.errors import LayoutError
from launcher.planning import layout as layouts
from launcher.planning import memory
from launcher.planning.layout import Layout, Placement, Shape
from launcher.planning.memory import GIB, OUTSIDE, TIGHT, Serving, Training, Usage

if TYPE_CHECKING:
    from launcher.cluster.profile import ClusterProfile


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What a step of training takes, as in finetune's settings."""

    sequence: int
    micro_batch: int
    global_batch: int
    precision: str = "bf16"
    recompute: str = "none"
    lora: int = 0
    lora_experts: bool = False
    first_stage_layers: int = 0
    last_stage_layers: int = 0
    virtual_pipeline: int = 1


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a cluster: a layout, on so many nodes, for so much work."""

    cluster: "ClusterProfile"
    layout: Layout
    nodes: int | None = None  # None: the fewest that the layout needs
    shape: Shape | None = None  # None: the model isn't known here
    work: Batch | Serving | None = None  # None: the layout is only written down (convert)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One axis whose ranks talk in every layer, and what of that leaves an NVLink domain."""

    axis: str
    ranks: int
    islands: int  # NVLink domains that one group touches; 1 is as it should be
    token_bytes: float = 0.0  # over the fabric, a token and layer
    step_bytes: float = 0.0  # over the fabric, a GPU and step
    step_seconds: float | None = None  # None: the profile doesn't say how fast the fabric is


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """All that can be told of a request that its arithmetic allows."""

    request: Request
    placement: Placement
    data: int = 1
    expert_data: int = 1
    micro_batches: int = 0
    bubble: float = 0.0  # share of a step that a GPU waits for the pipeline to fill and to drain
    exchanges: tuple[Exchange, ...] = ()
    usage: tuple[Usage, ...] = ()
    cache_room: int | None = None  # tokens that serve's cache holds on the profile's GPU
    shortage: str = ""  # what doesn't fit into a GPU's memory, with the numbers
    tight: str = ""
    unchecked: str = ""  # why memory wasn't checked
    stages: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        """All ranks."""
        return self.placement.world

    @property
    def tokens_a_step(self) -> int:
        """Of the whole global batch; 0 where nothing is trained."""
        work = self.request.work
        return work.global_batch * work.sequence if isinstance(work, Batch) else 0

    @property
    def fullest(self) -> Usage | None:
        """The stage that needs most memory."""
        return max(self.usage, key=lambda usage: usage.total, default=None)


def study(request: Request) -> Outlook:
    """The outlook of `request`; `LayoutError` with names and values for what can't be."""
    layout, shape, work = request.layout, request.shape, request.work
    if shape:
        shape.check(layout)
    stages = _stages(request)
    gpus = request.cluster.node.gpus
    if work is None:
        return Outlook(request=request, placement=Placement(nodes=1, tasks_per_node=1), stages=stages)
    if layout.context > 1 and isinstance(work, Serving):
        raise LayoutError(f"--cp: {layout.context}, but answers are made token by token: use 1")
    placement = layouts.place(layout, nodes=request.nodes, gpus=gpus)
    outlook = Outlook(
        request=request,
        placement=placement,
        data=layout.data_parallel(placement.world),
        expert_data=placement.world // (layout.expert_tensor * layout.expert * layout.pipeline),
        stages=stages,
    )
    return _serving(outlook, work) if isinstance(work, Serving) else _training(outlook, work)


def _stages(request: Request) -> tuple[int, ...]:
    """Layers of each pipeline stage; none where the model isn't known."""
    shape, work = request.shape, request.work
    if isinstance(work, Batch):
        _check_chunks(request.layout, shape, work)
    if shape is None:
        return ()
    own = (work.first_stage_layers, work.last_stage_layers) if isinstance(work, Batch) else ()
    return shape.stages(request.layout.pipeline, *own)


def _check_chunks(layout: Layout, shape: Shape | None, batch: Batch) -> None:
    """`LayoutError` when stages can't work on so many chunks of layers in turn."""
    chunks = batch.virtual_pipeline
    if chunks == 1:
        return
    if layout.pipeline == 1:
        raise LayoutError(f"--virtual-pipeline: {chunks}, but PP 1 has nothing to interleave; use 1")
    if batch.first_stage_layers or batch.last_stage_layers:
        raise LayoutError("--virtual-pipeline: its chunks are of one length; leave out --first/last-stage-layers")
    if shape and shape.layers % (layout.pipeline * chunks):
        raise LayoutError(
            f"--virtual-pipeline: {shape.layers} layers / (PP {layout.pipeline} x {chunks} chunks) = "
            f"{shape.layers / layout.pipeline / chunks:.3g}, not whole"
        )


def _training(outlook: Outlook, batch: Batch) -> Outlook:
    layout, shape = outlook.request.layout, outlook.request.shape
    micro_batches = _micro_batches(batch, outlook.data, rounds_of(layout, batch))
    _check_sequence(batch, layout)
    work = Training(
        sequence=batch.sequence,
        micro_batch=batch.micro_batch,
        micro_batches=micro_batches,
        precision=batch.precision,
        recompute=batch.recompute,
        lora=batch.lora,
        lora_experts=batch.lora_experts,
        stages=outlook.stages,
        virtual_pipeline=batch.virtual_pipeline,
    )
    rounds = micro_batches * batch.virtual_pipeline + layout.pipeline - 1
    return _with_verdict(
        replace(
            outlook,
            micro_batches=micro_batches,
            bubble=(layout.pipeline - 1) / rounds,
            exchanges=tuple(_exchanges(outlook, work)),
            usage=memory.training(shape, layout, outlook.world, work) if shape else (),
        )
    )


def rounds_of(layout: Layout, batch: Batch) -> int:
    """Micro batches come in multiples of so many: stages take up their next chunk after PP of them."""
    return layout.pipeline if batch.virtual_pipeline > 1 else 1


def _micro_batches(batch: Batch, data: int, rounds: int) -> int:
    """What one replica does in a step; whole, in whole `rounds`, or `LayoutError` with the equation."""
    per_round = batch.micro_batch * data
    if batch.global_batch % per_round:
        raise LayoutError(
            f"--global-batch: {batch.global_batch} = micro batch {batch.micro_batch} x DP {data} x "
            f"{batch.global_batch / per_round:.3g} accumulated steps, which isn't whole; "
            f"use a multiple of {per_round * rounds}"
        )
    count = batch.global_batch // per_round
    if count % rounds:
        raise LayoutError(
            f"--virtual-pipeline: {batch.global_batch} = micro batch {batch.micro_batch} x DP {data} x {count} "
            f"micro batches, and {count} / PP {rounds} = {count / rounds:.3g}, not whole; use a --global-batch "
            f"that is a multiple of {per_round * rounds}"
        )
    return count


def _check_sequence(batch: Batch, layout: Layout) -> None:
    parts = sequence_parts(layout)
    if batch.sequence % parts:
        names = f"TP {layout.tensor}" + (f" x 2 x CP {layout.context}" if layout.context > 1 else "")
        raise LayoutError(
            f"--sequence-length: {batch.sequence} / ({names}) = {batch.sequence / parts:.4g} isn't whole; "
            f"use a multiple of {parts}"
        )


def sequence_parts(layout: Layout) -> int:
    """Pieces of a sequence: TP ranks share out its tokens; CP ranks take two each, one early and one late."""
    return layout.tensor * (2 * layout.context if layout.context > 1 else 1)


def _serving(outlook: Outlook, work: Serving) -> Outlook:
    layout, shape, gpu = outlook.request.layout, outlook.request.shape, gpu_bytes(outlook.request)
    if shape and work.tokens > shape.positions:
        raise LayoutError(f"--max-tokens: {work.tokens}, but the model's context is {shape.positions} tokens")
    room = memory.cache_room(shape, layout, work, gpu) if shape and gpu else None
    cached = work.cache_tokens if room is None else min(work.cache_tokens, max(room, 0))
    usage = memory.serving(shape, layout, work, cached) if shape else ()
    exchanges = tuple(_exchanges(outlook, work))
    return _with_verdict(replace(outlook, usage=usage, cache_room=room, exchanges=exchanges))


def gpu_bytes(request: Request) -> float | None:
    """One GPU's memory; makers write GB for what is nearly GiB."""
    size = request.cluster.node.gpu_memory_gb
    return size * GIB if size else None


def _with_verdict(outlook: Outlook) -> Outlook:
    """Memory against the profile's GPU."""
    fullest, gpu = outlook.fullest, gpu_bytes(outlook.request)
    if fullest is None:
        return replace(outlook, unchecked="the model's shape isn't known here")
    if gpu is None:
        return replace(outlook, unchecked="the profile doesn't say node.gpu_memory_gb")
    if isinstance(work := outlook.request.work, Serving):
        assert outlook.cache_room is not None
        return _with_room(outlook, work, outlook.cache_room, gpu)
    needed = fullest.total + OUTSIDE
    said = (
        f"stage {fullest.stage + 1} of {outlook.request.layout.pipeline} needs {fullest.total / GIB:.1f} GiB "
        f"({itemized(fullest)}) and {OUTSIDE / GIB:g} GiB go to CUDA and NCCL; a GPU has {gpu / GIB:g}"
    )
    if needed > gpu:
        return replace(outlook, shortage=said)
    return replace(outlook, tight=said if needed > TIGHT * gpu else "")


def _with_room(outlook: Outlook, work: Serving, room: int, gpu: float) -> Outlook:
    """A server takes what the weights leave: it must be one request at its longest, and should be all of them."""
    one = (work.pages + 1) * memory.PAGE
    if room < one:
        weights = max(usage.parts["weights"] for usage in outlook.usage)
        said = f"weights take {weights / GIB:.1f} of a GPU's {gpu / GIB:g} GiB, and what they leave "
        said += f"holds {room} tokens" if room > 0 else "holds no cache"
        return replace(outlook, shortage=f"{said}; one request of {work.tokens} tokens takes {one}")
    if room < work.cache_tokens:
        said = f"the cache has room for {room // one} of {work.requests} requests of {work.tokens} tokens at once"
        return replace(outlook, tight=said)
    return outlook


def itemized(usage: Usage) -> str:
    """`weights 3.5, gradients 7.0`, in GiB."""
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in usage.parts.items() if size)


def _exchanges(outlook: Outlook, work: Training | Serving) -> Iterator[Exchange]:
    """What experts and tensor parallelism move, per layer and token: forward, and in training backward too."""
    layout, shape = outlook.request.layout, outlook.request.shape
    width = shape.hidden * memory.BYTES[work.precision] if shape else 0
    trains, again = isinstance(work, Training), 1.0
    if isinstance(work, Training) and work.recompute == "full":
        again = 1.5
    if layout.expert * layout.expert_tensor > 1:
        # Each copy of a token goes to its expert and comes back, once forward and once backward.
        chosen = shape.experts_a_token if shape else 0
        copies = (4 if trains else 2) * again * chosen
        yield _exchange(outlook, work, "EP", layout.expert * layout.expert_tensor, copies * width)
    if layout.tensor > 1:
        # The attention's input is gathered and its output scattered; the backward pass gathers the input once more.
        yield _exchange(outlook, work, "TP", layout.tensor, (5 if trains else 2) * again * width * layout.tensor)


def _exchange(outlook: Outlook, work: Training | Serving, axis: str, ranks: int, token_bytes: float) -> Exchange:
    """`token_bytes` per layer and kept token; what stays in the domain costs next to nothing."""
    node = outlook.request.cluster.node
    nvlink = node.nvlink_domain or node.gpus or ranks
    islands = outlook.placement.islands(ranks, nvlink)
    leaving = token_bytes * (1 - 1 / islands)
    if not isinstance(work, Training):
        return Exchange(axis=axis, ranks=ranks, islands=islands, token_bytes=leaving)
    tokens = memory.tokens_kept(outlook.request.layout, work) * work.micro_batches
    step_bytes = leaving * tokens * max(outlook.stages, default=0)
    return Exchange(
        axis=axis,
        ranks=ranks,
        islands=islands,
        token_bytes=leaving,
        step_bytes=step_bytes,
        step_seconds=step_bytes / (node.fabric_gb_s * 1e9) if node.fabric_gb_s and islands > 1 else None,
    )
