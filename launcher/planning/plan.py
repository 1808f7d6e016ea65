"""What a plan is: everything that decides a job's script, and what of it a user can ask for."""

from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.cluster.profile import ClusterProfile
from launcher.errors import LayoutError
from launcher.planning.fit import Outlook
from launcher.planning.layout import Placement
from megatron_mixtral.spec.layout import Layout

API_KEY = "MIXLAUNCH_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CONVERTERS = 8  # processes a node that convert, unless told otherwise
PRESETS = {  # of `convert`, by what the weights are for
    "train": Layout(pipeline=4, expert=8),
    "inference": Layout(pipeline=2),
}
FINETUNE_ON_SLURM = PRESETS["train"]
SERVE_ON_SLURM = PRESETS["inference"]
SERVE_BY_NVLINK = Layout(tensor=2, expert_tensor=2)  # on an H200 two to three times as fast as two stages


@dataclass(frozen=True, kw_only=True)
class Input:
    """A path that must exist before the job can run, and how to get it."""

    path: str
    what: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What every job can be asked for."""

    name: str | None = None
    nodes: int | None = None
    time: str | None = None
    secrets: tuple[str, ...] = ()  # beside the profile's: names of variables of the environment


@dataclass(frozen=True, kw_only=True)
class Axes:
    """The axes of a layout that were given; the job's preset has the others."""

    tensor: int | None = None
    pipeline: int | None = None
    expert: int | None = None
    expert_tensor: int | None = None
    context: int | None = None

    def over(self, preset: Layout) -> Layout:
        """`preset` with what was given in its place."""
        given = {name: size for name, size in asdict(self).items() if size is not None}
        if small := [f"{name} {size}" for name, size in given.items() if size < 1]:
            raise LayoutError(f"{', '.join(small)}: every axis is at least 1")
        return replace(preset, **given)


@dataclass(frozen=True, kw_only=True)
class PipelineStep:
    """A job's step in a pipeline: its number, and the runs and jobs that must succeed before it."""

    pipeline: str
    step: int
    steps: int
    after: tuple[str, ...] = ()
    jobs: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """Everything that decides a job's script. `config` is what the job reads, keys as in its configuration."""

    job: str
    name: str
    profile: ClusterProfile
    placement: Placement
    config: dict[str, Any]
    layout: Layout | None = None
    outlook: Outlook | None = None  # of the layout: what it makes of the ranks, and whether memory suffices
    gpus_per_node: int = 0
    time: str
    resumable: bool = False
    inputs: tuple[Input, ...] = ()
    outputs: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()  # variables whose values the submission puts into secrets.env
    exclude: tuple[str, ...] = ()  # nodes that weren't to be used
    bad_nodes: tuple[str, ...] = ()  # nodes on the cluster's list
    secrets_made: tuple[str, ...] = ()  # random values that the script puts into secrets.env
    link: PipelineStep | None = None

    @property
    def queue_options(self) -> list[str]:
        """Options of sbatch besides the script; the script can be submitted again without them."""
        if self.link is None or not self.link.jobs:
            return []
        return [f"--dependency=afterok:{':'.join(self.link.jobs)}", "--kill-on-invalid-dep=yes"]

    @property
    def health_check(self) -> bool:
        """Whether each node is looked at before the ranks start."""
        return self.profile.health_check and not self.profile.is_local

    @property
    def nodes(self) -> int:
        """Nodes of the job."""
        return self.placement.nodes

    @property
    def tasks_per_node(self) -> int:
        """Ranks on each node."""
        return self.placement.tasks_per_node

    @property
    def world(self) -> int:
        """Ranks of the job."""
        return self.placement.world

    @property
    def cpus_per_task(self) -> int | None:
        """A rank's share of its node's cores; None where the profile doesn't say how many there are."""
        node = self.profile.node
        if node.cpus is None:
            return None
        if not self.gpus_per_node or self.profile.exclusive:
            return max(1, node.cpus // self.tasks_per_node)
        return max(1, node.cpus // node.gpus * (self.gpus_per_node // self.tasks_per_node))

    @property
    def retried(self) -> bool:
        """Whether it starts again after a fault. A server doesn't, because its clients have already got errors."""
        return self.resumable and self.job != "serve"

    @property
    def memory(self) -> str | None:
        """What `--mem` asks for: everything on exclusive nodes, else the job's share of the profile's memory."""
        node = self.profile.node
        if self.profile.exclusive:
            return "0"
        if node.memory_gb is None:
            return None
        share = self.gpus_per_node / node.gpus if self.gpus_per_node else 1
        return f"{max(1, int(node.memory_gb * share))}G"
