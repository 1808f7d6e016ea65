"""How one model is cut over ranks: the arithmetic of tensor, pipeline, context, expert and data parallelism.

world = TP x PP x CP x DP, and ETP x EP divides world / PP (experts borrow ranks of the data and tensor axes).
"""

import math
from dataclasses import dataclass

from launcher.errors import LayoutError

MOST_RANKS = 100_000  # beyond any cluster: a slip of the finger, and arithmetic over ranks that takes minutes


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes of the axes that cut the model; what is left over is data parallelism."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    @property
    def unit(self) -> int:
        """The fewest ranks this layout can stand on; every world it fits is a multiple."""
        return self.pipeline * math.lcm(self.tensor * self.context, self.expert_tensor * self.expert)

    def data_parallel(self, world: int) -> int:
        """DP on `world` ranks; `LayoutError` carries the equation when it isn't whole."""
        if world % self.unit:
            below = world - world % self.unit
            near = f"{below} or {below + self.unit}" if below else str(self.unit)
            raise LayoutError(f"{world} ranks don't fit:\n{self.equation(world)}\nNearest that fit: {near} ranks")
        return world // (self.tensor * self.pipeline * self.context)

    def equation(self, world: int) -> str:
        """Names and values of what must come out whole, a line each, marked where it doesn't."""
        dense = self.tensor * self.pipeline * self.context
        sparse = self.expert_tensor * self.expert * self.pipeline
        dense_axes = f"TP {self.tensor} x PP {self.pipeline} x CP {self.context}"
        sparse_axes = f"ETP {self.expert_tensor} x EP {self.expert} x PP {self.pipeline}"
        return (
            f"  DP = {world} / ({dense_axes}) = {_quotient(world, dense)}\n"
            f"  expert DP = {world} / ({sparse_axes}) = {_quotient(world, sparse)}"
        )

    def describe(self, world: int) -> str:
        """One line for people: `32 ranks = TP1 x PP4 x CP1 x DP8, experts EP8 x ETP1`."""
        axes = f"TP{self.tensor} x PP{self.pipeline} x CP{self.context} x DP{self.data_parallel(world)}"
        return f"{world} rank{'s' * (world != 1)} = {axes}, experts EP{self.expert} x ETP{self.expert_tensor}"


def _quotient(whole: int, parts: int) -> str:
    return str(whole // parts) if whole % parts == 0 else f"{whole / parts:.3g}, not whole"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a model: those that a layout has to divide, and those that its memory follows from."""

    layers: int
    experts: int
    heads: int
    query_groups: int
    expert_width: int
    hidden: int
    head_size: int
    vocabulary: int
    experts_a_token: int = 2
    positions: int = 32768
    tied: bool = False  # one matrix for embedding and head

    @property
    def queries(self) -> int:
        """Width of all queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """Width of all keys."""
        return self.query_groups * self.head_size

    def check(self, layout: Layout) -> None:
        """`LayoutError` with every division that doesn't come out."""
        divisions = (
            ("experts / EP", self.experts, layout.expert),
            ("attention heads / TP", self.heads, layout.tensor),
            ("query groups / TP", self.query_groups, layout.tensor),
            ("expert width / ETP", self.expert_width, layout.expert_tensor),
        )
        bad = [f"{what} = {whole} / {parts} isn't whole" for what, whole, parts in divisions if whole % parts]
        if self.layers < layout.pipeline:
            bad.append(f"layers / PP = {self.layers} / {layout.pipeline} leaves stages without a layer")
        if bad:
            raise LayoutError(f"this model can't be cut so: {', '.join(bad)}")

    def stages(self, pipeline: int, first: int = 0, last: int = 0) -> tuple[int, ...]:
        """Layers of each pipeline stage. Those of the first and the last may be given; the rest is shared evenly.

        Where nothing is given and they don't divide, the earlier stages take one more.
        """
        if not first and not last:
            whole, rest = divmod(self.layers, pipeline)
            return tuple(whole + (stage < rest) for stage in range(pipeline))
        between, left = pipeline - bool(first) - bool(last), self.layers - first - last
        if pipeline < 2 or left < between or (left % between if between else left):
            raise LayoutError(
                f"--first-stage-layers {first}, --last-stage-layers {last}: {self.layers} layers leave {left} for "
                f"{max(between, 0)} other stages of PP {pipeline}: not the same whole number, at least 1, for each"
            )
        middle = (left // between,) * between if between else ()
        return ((first,) if first else ()) + middle + ((last,) if last else ())


SHAPES = {
    "8x7B": Shape(
        layers=32,
        experts=8,
        heads=32,
        query_groups=8,
        expert_width=14336,
        hidden=4096,
        head_size=128,
        vocabulary=32000,
    ),
    "8x22B": Shape(
        layers=56,
        experts=8,
        heads=48,
        query_groups=8,
        expert_width=16384,
        hidden=6144,
        head_size=128,
        vocabulary=32768,  # the Instruct model's; the base model has 32000
        positions=65536,
    ),
}


def known_shape(model: str) -> Shape | None:
    """The shape of a published Mixtral by its repository's name; None for any other."""
    return next((shape for size, shape in SHAPES.items() if f"Mixtral-{size}" in model), None)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Ranks over nodes, the same number on each."""

    nodes: int
    tasks_per_node: int

    @property
    def world(self) -> int:
        """All ranks."""
        return self.nodes * self.tasks_per_node

    def islands(self, size: int, nvlink: int) -> int:
        """The most NVLink domains of `nvlink` GPUs that a group of `size` neighbouring ranks touches.

        Domains of several nodes are taken to begin at the job's first node.
        """
        return max(
            len({self._island(rank, nvlink) for rank in range(first, first + size)})
            for first in range(0, self.world, size)
        )

    def _island(self, rank: int, nvlink: int) -> tuple[int, int]:
        node, place = divmod(rank, self.tasks_per_node)
        return (node, place // nvlink) if nvlink < self.tasks_per_node else (rank // nvlink, 0)


def place(layout: Layout, *, nodes: int | None, gpus: int) -> Placement:
    """Whole nodes when `nodes` is given, else the fewest ranks on the fewest nodes; 0 `gpus` is no limit."""
    for what, ranks in ((f"{nodes} nodes x {gpus} GPUs", (nodes or 0) * gpus), ("this layout", layout.unit)):
        if ranks > MOST_RANKS:
            raise LayoutError(f"{what}: {ranks} ranks; at most {MOST_RANKS}")
    if nodes is None:
        fewest = math.ceil(layout.unit / gpus) if gpus else 1
        count = next(n for n in range(fewest, layout.unit + 1) if layout.unit % n == 0)
        return Placement(nodes=count, tasks_per_node=layout.unit // count)
    if not gpus:
        if nodes != 1:
            raise LayoutError(f"nodes: {nodes}, but this cluster is one machine")
        return Placement(nodes=1, tasks_per_node=layout.unit)
    world = nodes * gpus
    if world % layout.unit:
        raise LayoutError(
            f"{nodes} node{'s' * (nodes != 1)} x {gpus} GPUs = {world} ranks don't fit:\n"
            f"{layout.equation(world)}\n{_nearest_nodes(layout, nodes, gpus)}"
        )
    return Placement(nodes=nodes, tasks_per_node=gpus)


def _nearest_nodes(layout: Layout, nodes: int, gpus: int) -> str:
    step = layout.unit // math.gcd(layout.unit, gpus)
    below = nodes - nodes % step
    fits = [str(n) for n in (below, below + step) if n]
    return f"Numbers of nodes that fit: multiples of {step}; nearest {' or '.join(fits)}"
