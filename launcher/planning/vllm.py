"""`serve --engine vllm`: one process on one node gets all of the job's GPUs, and vLLM starts its own workers
(pure).

Our options give the layout: tensor and pipeline parallelism are vLLM's. Experts are divided by TP, or with --ep
equal to --tp each expert is whole on one GPU.
"""

from dataclasses import replace

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile
from launcher.errors import LayoutError, UsageError
from launcher.planning.layout import Placement
from launcher.planning.plan import Axes, JobPlan
from megatron_mixtral.spec.layout import Layout

ENGINE = "vllm"
MOST_TENSOR = 8  # a Mixtral has as many query groups


def layout(profile: ClusterProfile, axes: Axes) -> Layout:
    """What was asked for; without that, tensor parallelism over the GPUs of a node."""
    if axes.context or axes.expert_tensor:
        raise UsageError("--cp, --etp: --engine vllm has only --tp, --pp and --ep")
    gpus = profile.node.gpus or 1
    widest = max(size for size in (1, 2, 4, MOST_TENSOR) if size <= gpus)
    tensor = axes.tensor or max(1, widest // (axes.pipeline or 1))
    expert = axes.expert or 1
    if expert not in (1, tensor):
        raise LayoutError(
            f"EP {expert}: with --engine vllm it must be TP (here {tensor}) or 1, which divides every expert"
        )
    return Layout(tensor=tensor, pipeline=axes.pipeline or 1, expert=expert, expert_tensor=tensor // expert)


def weights(profile: ClusterProfile, model: str) -> str:
    """vLLM reads the hub's layout: of a repository that is what was downloaded, anything else is exported first."""
    of_hub = "/" in model and not paths.is_path(model)
    return paths.hub_folder(profile, model) if of_hub else paths.weights(profile, model)


def adapted(plan: JobPlan) -> JobPlan:
    """`plan`, which has a rank for each GPU, as one process that has all GPUs."""
    if plan.nodes > 1:
        raise LayoutError(
            f"--engine vllm runs on one node: {plan.world} GPUs = TP x PP are more than the "
            f"{plan.profile.node.gpus} of a node of {plan.profile.name}"
        )
    config = plan.config | {"exports": plan.profile.paths.models}
    gpus = plan.world if plan.profile.node.gpus else 0
    return replace(plan, placement=Placement(nodes=1, tasks_per_node=1), gpus_per_node=gpus, config=config)
