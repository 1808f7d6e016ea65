"""Turns a plan for a cluster into the same plan for a sandbox that mirrors the cluster (pure).

The sandbox imitates partition, account, QoS, constraint, reservation, nodes, ranks, layout and request style.
Everything that this machine lacks is replaced, and `differences` names it with the reason.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.profile import ClusterProfile
from launcher.cluster.sections import Binding, Container, Login, Paths
from launcher.planning.plan import JobPlan
from launcher.sandbox.config import ClusterShape
from launcher.script import render
from megatron_mixtral.spec.layout import Layout

SEQUENCE = 64
NEVER = 1_000_000  # steps: the rehearsal ends the run, not the run itself
ON_PROCESSORS = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
ONLY_THERE = ("fp8", "fp8_recipe", "wandb_project")  # settings that need a GPU or a key
REASONS = {
    "container": "the ranks run in this machine's Python",
    "python": "the ranks run in this machine's Python",
    "environment": "ranks run on CPUs with one thread each, and meet over the loopback",
    "binding": "this machine's cores differ from the cluster's",
    "secrets": "a rehearsal needs none",
    "paths": "the rehearsal has its own models, data and runs",
    "slurm_conf": "the sandbox is another Slurm",
    "login": "the sandbox is on this machine",
    "extra": "only the real cluster knows these options",
    "comment": "",
}
# Options of `extra` that a Slurm without the hardware, licences or plugins behind them refuses.
UNLIKELY = (
    "licenses",
    "clusters",
    "bb",
    "bbf",
    "network",
    "container",
    "nodelist",
    "nodefile",
    "exclude",
    "mail-user",
)


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """A model as small as the layout allows."""

    layers: int
    experts: int
    heads: int
    kv_heads: int
    hidden: int
    intermediate: int

    def config(self, output: Path) -> dict[str, Any]:
        """As the job `tiny` reads it."""
        return {"output": str(output), "max_positions": SEQUENCE, "shards": 1, **dataclasses.asdict(self)}


def shape(plan: JobPlan) -> ClusterShape:
    """A sandbox as large as the job, with the names in its script."""
    profile = plan.profile
    names = profile.partition.split(",") if profile.partition else ["rehearsal"]
    return ClusterShape(
        nodes=plan.nodes,
        gpus=profile.node.gpus,
        gpu_type=profile.node.gpu_type or "",
        cpus=profile.node.cpus or max(64, plan.tasks_per_node),
        memory_gb=profile.node.memory_gb or 512,
        partitions=tuple((name, 1) for name in names),
        features=tuple(dict.fromkeys(re.findall(r"[A-Za-z_][\w.-]*", profile.constraint or ""))),
        accounts=(profile.account,) if profile.account else (),
        qos=(profile.qos,) if profile.qos else (),
    )


def tiny(layout: Layout, config: dict[str, Any]) -> Tiny:
    """At least two layers, eight experts and two query groups; more where the layout needs more."""
    query_groups = math.lcm(2, layout.tensor)
    heads = math.lcm(4, query_groups)
    return Tiny(
        layers=max(2, _fewest_layers(layout, config)),
        experts=math.lcm(8, layout.expert),
        heads=heads,
        kv_heads=query_groups,
        hidden=16 * heads,
        intermediate=math.lcm(64, layout.expert_tensor),
    )


def _fewest_layers(layout: Layout, config: dict[str, Any]) -> int:
    """One for each stage or interleaved chunk; the first and the last stage may have a number of their own."""
    own: list[int] = [n for n in (config.get("first_stage_layers"), config.get("last_stage_layers")) if n]
    return sum(own) + (layout.pipeline - len(own)) * int(config.get("virtual_pipeline", 1))


def rehearsed(plan: JobPlan, *, folder: Path, slurm_conf: Path, python: str, model: Path, data: Path) -> JobPlan:
    """`plan` as the sandbox runs it: same script, same topology, a tiny model, and a run that doesn't end by
    itself.
    """
    assert plan.layout is not None
    profile = plan.profile
    extra = {name: value for name, value in profile.extra.items() if name not in UNLIKELY}
    changed = profile.model_copy(
        update={
            "container": Container(),
            "binding": Binding(),
            "secrets": (),
            "environment": {**profile.environment, **ON_PROCESSORS},
            "python": python,
            "paths": Paths(models=str(folder / "models"), data=str(folder / "data"), runs=str(folder / "runs")),
            "slurm_conf": str(slurm_conf),
            "login": Login(),
            "extra": extra,
        }
    )
    micro, interleaved = int(plan.config.get("micro_batch", 1)), plan.config.get("virtual_pipeline", 1) > 1
    replicas = plan.layout.data_parallel(plan.world)
    config = {
        **{key: value for key, value in plan.config.items() if key not in ONLY_THERE},
        "model": str(model),
        "data": str(data),
        "steps": NEVER,
        "sequence_length": SEQUENCE,
        "global_batch": micro * replicas * (plan.layout.pipeline if interleaved else 1),
        "eval_interval": NEVER,
        "save_interval": NEVER,
        "log_interval": 1,
    }
    return dataclasses.replace(plan, profile=changed, config=config, inputs=(), outputs=(), secrets=())


def differences(real: ClusterProfile, mirrored: ClusterProfile) -> Iterator[str]:
    """`what: from -> to (why)` for every part of the profile that the rehearsal replaces."""
    before, after = real.model_dump(exclude_none=True), mirrored.model_dump(exclude_none=True)
    for key in ClusterProfile.model_fields:
        old, new = before.get(key), after.get(key)
        if old != new:
            yield f"{key}: {_change(old, new)} ({REASONS[key]})"


def what_differs(plan: JobPlan, mirrored: JobPlan) -> Iterator[str]:
    """A line for each part of the rehearsal that isn't as on the cluster."""
    assert mirrored.layout is not None
    yield from differences(plan.profile, mirrored.profile)
    yield "GPUs: CPUs and gloo instead of GPUs and NCCL; memory and speed say nothing about the cluster"
    yield "nodes: all of them are this machine, at one address; the network and the file system aren't tested"
    left_out = [f"--{key.replace('_', '-')}" for key in ONLY_THERE if key in plan.config]
    if left_out:
        yield f"settings: without {', '.join(left_out)}, which need a GPU or a key"
    small = tiny(mirrored.layout, mirrored.config)
    model = f"{small.layers} layers of {small.hidden}, {small.experts} experts, random weights"
    yield f"model: {model}; batches are as small as the layout allows"


def _change(old: Any, new: Any) -> str:
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return f"{_shown(old)} -> {_shown(new)}"
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return ", ".join(f"{key} {_shown(old.get(key))} -> {_shown(new.get(key))}" for key in keys)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        value = " ".join(map(str, value))
    return "nothing" if value is None else str(value) or "empty"


def script_diff(real: JobPlan, rehearsal: JobPlan, run_dir: Path) -> str:
    """The two scripts side by side, as `diff -u` shows them."""
    theirs = f"{real.profile.paths.runs}/{run_dir.name}"
    old = render.render(real, theirs).splitlines(keepends=True)
    new = render.render(rehearsal, str(run_dir)).splitlines(keepends=True)
    return "".join(difflib.unified_diff(old, new, real.profile.name, "rehearsal", n=1))
