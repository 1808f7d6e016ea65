"""Whether a job can run on its cluster: arithmetic, memory, bubble and fabric (pure).

`study` raises `LayoutError` with the equation for an impossible layout. If only the memory estimate is too large,
`Outlook.shortage` says so, and the user may overrule it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launcher.cluster.profile import ClusterProfile
from launcher.errors import LayoutError
from launcher.planning import layout as layouts
from launcher.planning import memory
from launcher.planning.layout import Placement
from launcher.planning.memory import GIB, OUTSIDE, TIGHT, ServingWork, TrainingWork, Usage
from launcher.planning.refusals import as_typed
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import PAGE
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape

Work = TrainingWork | ServingWork


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a cluster: a layout, on so many nodes, for so much work."""

    cluster: ClusterProfile
    layout: Layout
    nodes: int | None = None  # None: the fewest that the layout needs
    shape: MixtralShape | None = None  # None: the model isn't known here
    work: Work | None = None  # None: the layout is only written down (convert)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One axis whose ranks communicate in every layer, and the part of it that leaves an NVLink domain."""

    axis: str
    ranks: int
    islands: int  # NVLink domains that one group touches; 1 is best
    token_bytes: float = 0.0  # over the fabric, a token and layer
    step_bytes: float = 0.0  # over the fabric, a GPU and step
    step_seconds: float | None = None  # None: the profile doesn't say how fast the fabric is


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """The result for a request whose arithmetic works."""

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
        return work.global_batch * work.sequence_length if isinstance(work, TrainingWork) else 0

    @property
    def fullest(self) -> Usage | None:
        """The stage that needs most memory."""
        return max(self.usage, key=lambda usage: usage.total, default=None)


@as_typed()
def study(request: Request) -> Outlook:
    """The outlook of `request`; `LayoutError` with names and values for what can't be."""
    return attempt(request)


def attempt(request: Request) -> Outlook:
    """The same with the contract's own errors, which cost nothing until they are shown."""
    layout, shape, work = request.layout, request.shape, request.work
    if shape:
        layout.check(shape)
    layouts.check_size(layout)
    stages = _stages(request)
    gpus = request.cluster.node.gpus
    if work is None:
        return Outlook(request=request, placement=Placement(nodes=1, tasks_per_node=1), stages=stages)
    if isinstance(work, ServingWork):
        checks.check_answers(layout)
    placement = layouts.place(layout, nodes=request.nodes, gpus=gpus)
    outlook = Outlook(
        request=request,
        placement=placement,
        data=layout.data_parallel(placement.world),
        expert_data=placement.world // (layout.expert_tensor * layout.expert * layout.pipeline),
        stages=stages,
    )
    return _serving(outlook, work) if isinstance(work, ServingWork) else _training(outlook, work)


def _stages(request: Request) -> tuple[int, ...]:
    """Layers of each pipeline stage; none where the model isn't known."""
    layout, shape, work = request.layout, request.shape, request.work
    if isinstance(work, TrainingWork):
        checks.check_chunks(layout, work, shape.num_hidden_layers if shape else None)
    if shape is None:
        return ()
    return work.stages(shape, layout) if isinstance(work, TrainingWork) else layout.stages(shape.num_hidden_layers)


def _training(outlook: Outlook, work: TrainingWork) -> Outlook:
    layout, shape = outlook.request.layout, outlook.request.shape
    micro_batches = checks.micro_batches(layout, work, outlook.data)
    checks.check_sequence(layout, work)
    outlook = replace(
        outlook,
        micro_batches=micro_batches,
        bubble=(layout.pipeline - 1) / (micro_batches * work.virtual_pipeline + layout.pipeline - 1),
        usage=memory.training(shape, layout, outlook.world, work) if shape else (),
    )
    return _with_verdict(replace(outlook, exchanges=tuple(_exchanges(outlook, work))))


def _serving(outlook: Outlook, work: ServingWork) -> Outlook:
    layout, shape, gpu = outlook.request.layout, outlook.request.shape, gpu_bytes(outlook.request)
    if shape and work.max_tokens > (context := shape.max_position_embeddings):
        raise LayoutError(f"--max-tokens: {work.max_tokens}, but the model's context is {context} tokens")
    room = memory.cache_room(shape, layout, work, gpu) if shape and gpu else None
    cached = work.cache_tokens if room is None else min(work.cache_tokens, max(room, 0))
    usage = memory.serving(shape, layout, work, cached) if shape else ()
    exchanges = tuple(_exchanges(outlook, work))
    return _with_verdict(replace(outlook, usage=usage, cache_room=room, exchanges=exchanges))


def gpu_bytes(request: Request) -> float | None:
    """One GPU's memory; the GB in a GPU's name are nearly GiB."""
    size = request.cluster.node.gpu_memory_gb
    return size * GIB if size else None


def _with_verdict(outlook: Outlook) -> Outlook:
    """Memory against the profile's GPU."""
    fullest, gpu = outlook.fullest, gpu_bytes(outlook.request)
    if fullest is None:
        return replace(outlook, unchecked="the model's shape isn't known here")
    if gpu is None:
        return replace(outlook, unchecked="the profile doesn't say node.gpu_memory_gb")
    if isinstance(work := outlook.request.work, ServingWork):
        assert outlook.cache_room is not None
        return _with_room(outlook, work, outlook.cache_room, gpu)
    needed = fullest.total + OUTSIDE
    said = (
        f"stage {fullest.stage + 1} of {outlook.request.layout.pipeline} needs {fullest.total / GIB:.1f} GiB "
        f"({itemized(fullest)}) and {OUTSIDE / GIB:g} GiB are for CUDA and NCCL; a GPU has {gpu / GIB:g}"
    )
    if needed > gpu:
        return replace(outlook, shortage=said)
    return replace(outlook, tight=said if needed > TIGHT * gpu else "")


def _with_room(outlook: Outlook, work: ServingWork, room: int, gpu: float) -> Outlook:
    """A server's cache gets what the weights leave. It must hold one request at its longest, better all."""
    one = (work.pages + 1) * PAGE
    if room < one:
        weights = max(usage.parts["weights"] for usage in outlook.usage)
        said = f"weights take {weights / GIB:.1f} of a GPU's {gpu / GIB:g} GiB, and the rest "
        said += f"holds {room} tokens" if room > 0 else "has no room for a cache"
        return replace(outlook, shortage=f"{said}; one request of {work.max_tokens} tokens takes {one}")
    if room < work.cache_tokens:
        wanted = f"{work.max_batch} requests of {work.max_tokens} tokens at once"
        return replace(outlook, tight=f"the cache has room for {room // one} of {wanted}")
    return outlook


def itemized(usage: Usage) -> str:
    """`weights 3.5, gradients 7.0`, in GiB."""
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in usage.parts.items() if size)


def _exchanges(outlook: Outlook, work: Work) -> Iterator[Exchange]:
    """Bytes that expert and tensor parallelism move for each layer and token: forward, and in training also
    backward.
    """
    layout, shape = outlook.request.layout, outlook.request.shape
    width = shape.hidden_size * memory.BYTES[work.precision] if shape else 0
    trains, again = isinstance(work, TrainingWork), 1.0
    if isinstance(work, TrainingWork) and work.recompute == "full":
        again = 1.5
    if layout.expert * layout.expert_tensor > 1:
        # Each copy of a token goes to its expert and comes back, once forward and once backward.
        chosen = shape.num_experts_per_tok if shape else 0
        copies = (4 if trains else 2) * again * chosen
        yield _exchange(outlook, work, "EP", layout.expert * layout.expert_tensor, copies * width)
    if layout.tensor > 1:
        # The attention's input is gathered and its output scattered; the backward pass gathers the input once more.
        yield _exchange(outlook, work, "TP", layout.tensor, (5 if trains else 2) * again * width * layout.tensor)


def _exchange(outlook: Outlook, work: Work, axis: str, ranks: int, token_bytes: float) -> Exchange:
    """`token_bytes` for each layer and kept token; traffic inside an NVLink domain counts as free."""
    node = outlook.request.cluster.node
    nvlink = node.nvlink_domain or node.gpus or ranks
    islands = outlook.placement.islands(ranks, nvlink)
    leaving = token_bytes * (1 - 1 / islands)
    if not isinstance(work, TrainingWork):
        return Exchange(axis=axis, ranks=ranks, islands=islands, token_bytes=leaving)
    tokens = memory.tokens_kept(outlook.request.layout, work) * outlook.micro_batches
    step_bytes = leaving * tokens * max(outlook.stages, default=0)
    return Exchange(
        axis=axis,
        ranks=ranks,
        islands=islands,
        token_bytes=leaving,
        step_bytes=step_bytes,
        step_seconds=step_bytes / (node.fabric_gb_s * 1e9) if node.fabric_gb_s and islands > 1 else None,
    )
