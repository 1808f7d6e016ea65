"""From a JobPlan to the text of its script: a pure function of the plan and of its profile's templates.

`templates` decides what a template may print, and finds the user's own templates.
"""

from collections.abc import Iterator
from typing import Any

import yaml

from launcher.cluster.profile import OF_RANKS
from launcher.common import quoting
from launcher.errors import UsageError
from launcher.planning.plan import JobPlan
from launcher.script import templates
from launcher.slurm import hostlist


def render(plan: JobPlan, run_dir: str | None = None, *, bundled: bool = False) -> str:
    """The script of `plan` for the run directory; without one, the script makes a run directory when it runs.

    `bundled`: the configuration is a file beside the script, not a text inside it.
    """
    return templates.render(plan.profile.templates, {**_variables(plan, run_dir), "bundled": bundled})


def config_text(plan: JobPlan) -> str:
    """`config.yaml` of `plan`."""
    return yaml.safe_dump(plan.config, sort_keys=False, allow_unicode=True, width=float("inf"))


def _variables(plan: JobPlan, run_dir: str | None) -> dict[str, Any]:
    profile = plan.profile
    return {
        "plan": plan,
        "profile": profile,
        "run_dir": run_dir,
        "directives": list(_directives(plan, run_dir)),
        "config": config_text(plan),
        "mounts": list(_mounts(plan, run_dir)) if profile.in_container else [],
        "environment": profile.environment,
        "pass_through": [*OF_RANKS, *profile.environment],
        "binding": _binding(plan),
        "numa": _numa(plan),
        "secrets": () if run_dir else plan.secrets,  # a submission brings them along
    }


def _binding(plan: JobPlan) -> dict[str, str]:
    """srun's options; every rank sees all GPUs of its node unless the profile says otherwise."""
    by_task = plan.gpus_per_node and plan.profile.gpu_request == "gpus-per-task"
    ours = {"gpu-bind": "none"} if by_task else {}
    if _numa(plan):
        ours["cpu-bind"] = "none"  # else numactl would have to choose among cores that may lie elsewhere
    return {**ours, **plan.profile.binding.of_srun}


def _numa(plan: JobPlan) -> tuple[int, ...]:
    """The NUMA node of each rank on a node, if the job has all GPUs. Otherwise it isn't known which GPUs the job
    gets.
    """
    whole = plan.gpus_per_node == len(plan.profile.binding.numa)
    return plan.profile.binding.numa if whole else ()


def _directives(plan: JobPlan, run_dir: str | None) -> Iterator[tuple[str, str | None]]:
    """(option, value) of every #SBATCH line, in the order people read them; a value of None is a flag."""
    profile = plan.profile
    if profile.is_local:
        return
    yield "job-name", plan.name
    for name in ("account", "partition", "qos", "reservation", "constraint", "comment"):
        if (value := getattr(profile, name)) is not None:
            yield name, value
    yield "nodes", str(plan.nodes)
    if profile.gpu_request == "gpus-per-task" and plan.gpus_per_node:
        yield "ntasks", str(plan.world)  # Slurm refuses GPUs by the task without it
    yield "ntasks-per-node", str(plan.tasks_per_node)
    if plan.cpus_per_task:
        yield "cpus-per-task", str(plan.cpus_per_task)
    yield from _gpu_request(plan)
    if plan.memory:
        yield "mem", plan.memory
    if profile.exclusive:
        yield "exclusive", None
    yield "time", plan.time
    yield "signal", f"B:USR2@{profile.signal_lead}"
    yield "open-mode", "append"
    yield ("requeue" if plan.resumable else "no-requeue"), None
    if run_dir:
        yield "output", f"{run_dir.replace('%', '%%')}/logs/slurm-%j.out"
    if nodes := {*profile.excluded, *plan.exclude, *plan.bad_nodes}:
        yield "exclude", hostlist.compress(nodes)
    for name, value in profile.extra.items():
        if name != "exclude":
            yield name, None if value is True else value


def _gpu_request(plan: JobPlan) -> Iterator[tuple[str, str]]:
    style, gpus = plan.profile.gpu_request, plan.gpus_per_node
    if not gpus or style == "none":
        return
    kind = f"{plan.profile.node.gpu_type}:" if plan.profile.node.gpu_type else ""
    yield {
        "gres": ("gres", f"gpu:{kind}{gpus}"),
        "gpus-per-node": ("gpus-per-node", f"{kind}{gpus}"),
        "gpus-per-task": ("gpus-per-task", f"{kind}{gpus // plan.tasks_per_node}"),
    }[style]


def _mounts(plan: JobPlan, run_dir: str | None) -> Iterator[str]:
    """HOST:CONTAINER[:ro] of the profile's mounts, of the shared paths, and of the job's other paths."""
    paths = plan.profile.paths
    covered: list[str] = []  # paths that are the same in the container, and writable
    for mount in plan.profile.container.mounts:
        host, inside, mode = [*mount.split(":"), "", ""][:3]
        if inside in ("", host) and not mode:
            covered.append(host)
        yield f"{host}:{inside or host}{mode and ':'}{mode}"
    wanted = [("paths.models", paths.models), ("paths.data", paths.data), ("paths.runs", paths.runs)]
    wanted += [("--output", path) for path in plan.outputs]
    wanted += [(_option(plan, given.path), given.path) for given in plan.inputs]
    wanted += [("run directory", run_dir)] if run_dir else []
    for field, path in wanted:
        if not any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in covered):
            covered.append(path)
            yield _bind(path, field)


def _option(plan: JobPlan, path: str) -> str:
    """The option that an input came by, for an error about it."""
    if path in plan.config.get("inputs", ()):
        return "FILES"
    return "--data" if path.startswith(f"{plan.config.get('data')}.") else "--model"


def _bind(path: str, field: str) -> str:
    if any(c in path for c in ":,"):
        raise UsageError(
            f"{field}: {quoting.shown(path)}: a path with ':' or ',' can't be mounted into a container"
        )
    return f"{path}:{path}"
