"""What to run, where and with which configuration: one pure function per job, from options and a profile to a plan.

Nothing here looks at Slurm or the file system; what must exist is listed in the plan and checked before submission.
"""

import os.path
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile, time_limit
from launcher.common import quoting
from launcher.errors import LayoutError, UsageError
from launcher.planning import asked, lora, megatron_files, settings, tuning, vllm
from launcher.planning import blend as blends
from launcher.planning import layout as layouts
from launcher.planning import secrets as secrets_env
from launcher.planning.fit import Outlook, Request
from launcher.planning.layout import Layout, Placement, Shape
from launcher.planning.settings import MODEL

API_KEY = "MIXLAUNCH_API_KEY"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
CONVERTERS = 8  # processes a node that convert, unless told otherwise
MISTRAL = "mistral"  # Mixtral's own way to write conversations, in place of a chat template
PRESETS = {  # of `convert`, by what the weights are for
    "train": Layout(pipeline=4, expert=8),
    "inference": Layout(pipeline=2),
}
FINETUNE_ON_SLURM = PRESETS["train"]
SERVE_ON_SLURM = PRESETS["inference"]


@dataclass(frozen=True, kw_only=True)
class Input:
    """A path that must exist before the job can run, and how one gets it."""

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
    """The parts of a layout that were given; the rest comes from the job's preset."""

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
class Link:
    """A job's place in a pipeline: which step of how many, and the runs and jobs that must end well before it."""

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
    link: Link | None = None

    @property
    def queue_options(self) -> list[str]:
        """What sbatch is told besides the script, which can be submitted again without it."""
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
        """Whether it starts again after a fault. A server doesn't: its clients were told already."""
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


def plan_tiny(profile: ClusterProfile, *, output: str, ask: Ask = Ask(), values: Mapping[str, Any] = {}) -> JobPlan:
    """A small Mixtral with random weights."""
    config = {"output": paths.path(output, "--output"), **settings.check("tiny", values)}
    return _single("tiny", profile, ask, config, outputs=(config["output"],))


def plan_download(
    profile: ClusterProfile,
    *,
    model: str = MODEL,
    output: str | None = None,
    revision: str | None = None,
    ask: Ask = Ask(),
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """A repository of the hub into the shared models folder. It resumes where it stopped."""
    if model.count("/") != 1 or paths.is_path(model):
        raise UsageError(f"REPO: {quoting.shown(model)} isn't a repository of the hub; such as {MODEL}")
    for part in model.split("/"):
        quoting.name(part, "REPO")
    target = paths.path(output, "--output") if output is not None else paths.hub_folder(profile, model)
    config = {"repo": model, "output": target, **settings.check("download", values)}
    if revision:
        config["revision"] = quoting.checked(revision, "--revision")
    return _single("download", profile, ask, config, outputs=(target,), resumable=True)


def plan_prepare(
    profile: ClusterProfile,
    *,
    files: tuple[str, ...],
    model: str = MODEL,
    output: str | None = None,
    ask: Ask = Ask(),
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Text or conversations into Megatron's `.bin`/`.idx`, by the tokenizer of `model`."""
    if not files:
        raise UsageError("FILES: give at least one file of text (.jsonl, .txt)")
    tokenizer = paths.hub_folder(profile, model)
    prefix = paths.path(output, "--output") if output is not None else paths.data_prefix(profile)
    config = {
        "inputs": [paths.path(f, "FILES") for f in files],
        "output": prefix,
        "tokenizer": tokenizer,
        **settings.check("prepare", values),
    }
    inputs = [Input(path=p, what="text") for p in config["inputs"]]
    if (template := config.get("chat_template")) not in (None, MISTRAL):
        config["chat_template"] = paths.path(template, "--chat-template")
        inputs.append(Input(path=config["chat_template"], what="chat template"))
    inputs.append(Input(path=tokenizer, what="tokenizer", hint=paths.hint("download", model)))
    folder = os.path.dirname(prefix)
    return _single("prepare", profile, ask, config, inputs=tuple(inputs), outputs=(folder,), resumable=True)


def plan_convert(
    profile: ClusterProfile,
    *,
    model: str = MODEL,
    to: str = "megatron",
    output: str | None = None,
    preset: str | None = None,
    axes: Axes = Axes(),
    processes: int | None = None,
    ask: Ask = Ask(),
    shape: Shape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Weights between the hub's layout and Megatron's. Ranks share the work; their number is free of the layout."""
    if to not in ("megatron", "hf", "peft"):
        raise UsageError(f"--to: {to!r} isn't one of megatron, hf, peft")
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset: {preset!r} isn't one of {', '.join(PRESETS)}")
    layout = axes.over(PRESETS[preset] if preset else Layout())
    layout, kind = megatron_files.kind(layout, axes.expert_tensor, to, values)
    outlook = asked.outlook(Request(cluster=profile, layout=layout, shape=shape or layouts.known_shape(model)))
    if to == "megatron":
        source, hint = paths.hub_folder(profile, model), paths.hint("download", model)
    else:
        source, hint = paths.weights(profile, model), paths.hint("convert --model", model)
    target = paths.path(output, "--output") if output is not None else paths.converted(profile, model, kind)
    config = {"source": source, "output": target, "to": to, "layout": asdict(layout)}
    return JobPlan(
        **_common("convert", profile, ask),
        placement=Placement(nodes=ask.nodes or 1, tasks_per_node=_processes(profile, processes)),
        resumable=True,
        layout=layout,
        outlook=outlook,
        config=config | _with_base(profile, settings.check("convert", values)),
        inputs=(Input(path=source, what="weights", hint=hint),),
        outputs=(target,),
    )


def plan_verify(
    profile: ClusterProfile,
    *,
    folder: str | None = None,
    model: str | None = None,
    processes: int | None = None,
    ask: Ask = Ask(),
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Whether a converted folder is as it was written."""
    if folder is not None and model is not None:
        raise UsageError("DIR and --model: give one of them")
    target = paths.path(folder, "DIR") if folder is not None else paths.weights(profile, model or MODEL)
    return JobPlan(
        **_common("verify", profile, ask),
        placement=Placement(nodes=ask.nodes or 1, tasks_per_node=_processes(profile, processes)),
        resumable=True,
        config={"folder": target, **settings.check("verify", values)},
        inputs=(Input(path=target, what="converted weights", hint=paths.hint("convert --model", model or MODEL)),),
    )


def plan_finetune(
    profile: ClusterProfile,
    *,
    model: str = MODEL,
    data: str | tuple[str, ...] | None = None,
    axes: Axes = Axes(),
    ask: Ask = Ask(),
    shape: Shape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Training from converted weights or from another run's newest checkpoint, on prepared data."""
    shape = shape or layouts.known_shape(model)
    chosen = tuning.checked(lora.checked(settings.check("finetune", values)), shape)
    request = Request(
        cluster=profile,
        layout=axes.over(Layout() if profile.is_local else FINETUNE_ON_SLURM),
        nodes=ask.nodes,
        shape=shape,
        work=asked.batch(chosen),
    )
    if chosen.get("lora") and not profile.is_local:
        request = replace(request, layout=lora.layout(request, axes.over))
    layout, outlook = request.layout, asked.outlook(request)
    tuning.check_packing(chosen, layout)
    weights = paths.weights(profile, model)
    blend, hint = blends.read(profile, data), "" if data else "`mixlaunch prepare FILES` makes it"
    return JobPlan(
        **_common("finetune", profile, ask),
        placement=outlook.placement,
        layout=layout,
        outlook=outlook,
        gpus_per_node=_gpus(profile, outlook.placement),
        config={"model": weights, "data": blend.written, "layout": asdict(layout), **chosen},
        resumable=True,
        inputs=(
            Input(path=weights, what="weights", hint=paths.hint("convert --model", model)),
            *(Input(path=f"{prefix}.idx", what="data", hint=hint) for prefix in blend.prefixes),
        ),
    )


def plan_serve(
    profile: ClusterProfile,
    *,
    model: str = MODEL,
    host: str | None = None,
    port: int | None = None,
    axes: Axes = Axes(),
    ask: Ask = Ask(),
    shape: Shape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """An HTTP server on the job's first rank. Beyond this machine it asks for a key, which the script makes."""
    chosen = _with_base(profile, settings.check("serve", values))
    by_vllm = chosen.get("engine") == vllm.ENGINE
    if by_vllm and chosen.get("fp8_experts"):
        raise UsageError("--fp8-experts: goes with --engine megatron alone")
    preset = Layout() if profile.is_local else SERVE_ON_SLURM
    layout = vllm.layout(profile, axes) if by_vllm else axes.over(preset)
    known = shape or layouts.known_shape(model)
    work = asked.serving(chosen, known)
    outlook = asked.outlook(Request(cluster=profile, layout=layout, nodes=ask.nodes, shape=known, work=work))
    weights = vllm.weights(profile, model) if by_vllm else paths.weights(profile, model)
    hint = paths.hint("download" if by_vllm else "convert --model", model)
    host = quoting.checked(host or profile.serve.host or ("127.0.0.1" if profile.is_local else "0.0.0.0"), "--host")
    config = {"model": weights, "layout": asdict(layout), "host": host, "port": port or profile.serve.port}
    config["other_port"] = port is None  # a port that was asked for is that one or none
    plan = JobPlan(
        **_common("serve", profile, ask),
        placement=outlook.placement,
        layout=layout,
        outlook=outlook,
        gpus_per_node=_gpus(profile, outlook.placement),
        config=config | chosen,
        resumable=True,
        inputs=(Input(path=weights, what="weights", hint=hint),),
        secrets_made=() if host in LOOPBACK else (API_KEY,),
    )
    return vllm.adapted(plan) if by_vllm else plan


PLANS: dict[str, Callable[..., JobPlan]] = {
    "tiny": plan_tiny,
    "download": plan_download,
    "prepare": plan_prepare,
    "convert": plan_convert,
    "verify": plan_verify,
    "finetune": plan_finetune,
    "serve": plan_serve,
}


def _single(job: str, profile: ClusterProfile, ask: Ask, config: dict[str, Any], **rest: Any) -> JobPlan:
    """A job of one process."""
    if ask.nodes not in (None, 1):
        raise UsageError(f"--nodes: {job} runs on one node")
    return JobPlan(
        **_common(job, profile, ask), placement=Placement(nodes=1, tasks_per_node=1), config=config, **rest
    )


def _common(job: str, profile: ClusterProfile, ask: Ask) -> dict[str, Any]:
    try:
        limit = profile.time if ask.time is None else time_limit(ask.time)
    except ValueError as error:
        raise UsageError(f"--time: {error}") from None
    return {
        "job": job,
        "name": quoting.name(job if ask.name is None else ask.name, "--name"),
        "profile": profile,
        "time": limit,
        "secrets": secrets_env.named(profile, ask.secrets),
    }


def _processes(profile: ClusterProfile, given: int | None) -> int:
    """Processes a node that copy weights: one feeds this machine's disk, several a parallel file system."""
    if given is not None and given < 1:
        raise UsageError(f"--processes: {given} must be at least 1")
    return given or (1 if profile.is_local else CONVERTERS)


def _with_base(profile: ClusterProfile, chosen: dict[str, Any]) -> dict[str, Any]:
    """The base of adapters may be named as any model is."""
    return chosen | {"base": paths.weights(profile, chosen["base"], "--base")} if "base" in chosen else chosen


def _gpus(profile: ClusterProfile, placement: Placement) -> int:
    return placement.tasks_per_node if profile.node.gpus else 0
