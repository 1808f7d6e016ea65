"""Where the ranks of a layout go: whole nodes, and which groups of ranks leave an NVLink domain (pure)."""

import math
from dataclasses import dataclass

from launcher.errors import LayoutError
from megatron_mixtral.spec.layout import Layout

MOST_RANKS = 100_000  # larger than any cluster: a typing error, and arithmetic that takes minutes
MOST_STAGES = 1_000  # more than any model has layers


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

        Domains of several nodes are assumed to begin at the job's first node.
        """
        per_node = -(-self.tasks_per_node // nvlink)

        def island(rank: int) -> int:
            node, place = divmod(rank, self.tasks_per_node)
            return node * per_node + place // nvlink if nvlink < self.tasks_per_node else rank // nvlink

        again = math.lcm(size, max(nvlink, self.tasks_per_node))  # from here on groups lie as before
        firsts = range(0, min(self.world, again), size)
        return max(island(first + size - 1) - island(first) + 1 for first in firsts)


def check_size(layout: Layout) -> None:
    """`LayoutError` for a layout that no cluster holds."""
    if layout.unit > MOST_RANKS:
        raise LayoutError(f"this layout: {layout.unit} ranks; at most {MOST_RANKS}")
    if layout.pipeline > MOST_STAGES:
        raise LayoutError(f"--pp: {layout.pipeline} pipeline stages; at most {MOST_STAGES}")


def place(layout: Layout, *, nodes: int | None, gpus: int) -> Placement:
    """Whole nodes when `nodes` is given, else the fewest ranks on the fewest nodes; 0 `gpus` is no limit."""
    check_size(layout)
    unit = layout.unit
    if (ranks := (nodes or 0) * gpus) > MOST_RANKS:
        raise LayoutError(f"{nodes} nodes x {gpus} GPUs: {ranks} ranks; at most {MOST_RANKS}")
    if nodes is None:
        fewest = math.ceil(unit / gpus) if gpus else 1
        count = next(n for n in range(fewest, unit + 1) if unit % n == 0)
        return Placement(nodes=count, tasks_per_node=unit // count)
    if not gpus:
        if nodes != 1:
            raise LayoutError(f"nodes: {nodes}, but this cluster is one machine")
        return Placement(nodes=1, tasks_per_node=unit)
    world = nodes * gpus
    if world % unit:
        equation = "\n".join(f"  {line}" for line in layout.equation(world))
        raise LayoutError(
            f"{nodes} node{'s' * (nodes != 1)} x {gpus} GPUs = {world} ranks don't fit:\n"
            f"{equation}\n{_nearest_nodes(layout, nodes, gpus)}"
        )
    return Placement(nodes=nodes, tasks_per_node=gpus)


def _nearest_nodes(layout: Layout, nodes: int, gpus: int) -> str:
    step = layout.unit // math.gcd(layout.unit, gpus)
    below = nodes - nodes % step
    fits = [str(n) for n in (below, below + step) if n]
    return f"Numbers of nodes that fit: multiples of {step}; nearest {' or '.join(fits)}"
