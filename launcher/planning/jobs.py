"""From options and a profile to a plan, one pure function for each job: what to run, where, and with which
configuration.

Nothing here asks Slurm or the file system. The plan lists its inputs, and they are checked before the submission.
"""

import os.path
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile, time_limit
from launcher.common import quoting
from launcher.errors import UsageError
from launcher.planning import blend as blends
from launcher.planning import lora, suggest, vllm
from launcher.planning import secrets as secrets_env
from launcher.planning.fit import Request
from launcher.planning.layout import Placement
from launcher.planning.memory import ServingWork, TrainingWork
from launcher.planning.plan import (
    API_KEY,
    CONVERTERS,
    FINETUNE_ON_SLURM,
    LOOPBACK,
    PRESETS,
    SERVE_BY_NVLINK,
    SERVE_ON_SLURM,
    Ask,
    Axes,
    Input,
    JobPlan,
)
from launcher.planning.refusals import as_typed
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import JOBS, MISTRAL, FinetuneConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import options
from megatron_mixtral.spec.shape import MODEL, MixtralShape, published


def plan_tiny(profile: ClusterProfile, *, output: str, ask: Ask = Ask(), values: Mapping[str, Any] = {}) -> JobPlan:
    """A small Mixtral with random weights."""
    config = {"output": paths.path(output, "--output"), **_chosen("tiny", values)}
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
    config = {"repo": model, "output": target, **_chosen("download", values)}
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
        **_chosen("prepare", values),
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
    shape: MixtralShape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Convert weights between the hub's layout and Megatron's. Ranks share the work; their number doesn't depend on
    the layout.
    """
    chosen = _chosen("convert", values, to=to)
    if preset is not None and preset not in PRESETS:
        raise UsageError(f"--preset: {preset!r} isn't one of {', '.join(PRESETS)}")
    layout = axes.over(PRESETS[preset] if preset else Layout())
    kind = to
    if chosen.get("format") == "legacy":
        layout, kind = _legacy(layout, axes)
    outlook = suggest.outlook(Request(cluster=profile, layout=layout, shape=shape or published(model)))
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
        config=config | _with_base(profile, chosen),
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
        config={"folder": target, **_chosen("verify", values)},
        inputs=(Input(path=target, what="converted weights", hint=paths.hint("convert --model", model or MODEL)),),
    )


def plan_finetune(
    profile: ClusterProfile,
    *,
    model: str = MODEL,
    data: str | tuple[str, ...] | None = None,
    axes: Axes = Axes(),
    ask: Ask = Ask(),
    shape: MixtralShape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """Training from converted weights or from another run's newest checkpoint, on prepared data."""
    shape = shape or published(model)
    chosen = _chosen("finetune", values)
    config = checks.complete(FinetuneConfig, chosen)
    with as_typed():
        if shape:
            checks.check_capacity(config, shape)
    request = Request(
        cluster=profile,
        layout=axes.over(Layout() if profile.is_local else FINETUNE_ON_SLURM),
        nodes=ask.nodes,
        shape=shape,
        work=TrainingWork.of(config),
    )
    if chosen.get("lora") and not profile.is_local:
        request = replace(request, layout=lora.layout(request, axes.over))
    layout, outlook = request.layout, suggest.outlook(request)
    with as_typed():
        checks.check_packing(config.packing or "stream", layout.context)
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
    shape: MixtralShape | None = None,
    values: Mapping[str, Any] = {},
) -> JobPlan:
    """An HTTP server on the job's first rank. Beyond this machine it asks for a key, which the script makes."""
    chosen = _with_base(profile, _chosen("serve", values))
    by_vllm = chosen.get("engine") == vllm.ENGINE
    known = shape or published(model)
    layout = vllm.layout(profile, axes) if by_vllm else axes.over(_serve_preset(profile, axes, known))
    work = ServingWork.of(chosen, known)
    outlook = suggest.outlook(Request(cluster=profile, layout=layout, nodes=ask.nodes, shape=known, work=work))
    weights = vllm.weights(profile, model) if by_vllm else paths.weights(profile, model)
    hint = paths.hint("download" if by_vllm else "convert --model", model)
    host = quoting.checked(host or profile.serve.host or ("127.0.0.1" if profile.is_local else "0.0.0.0"), "--host")
    config = {"model": weights, "layout": asdict(layout), "host": host, "port": port or profile.serve.port}
    config["other_port"] = port is None  # a port given by --port is used, or the job fails
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


def _chosen(job: str, values: Mapping[str, Any], **planned: Any) -> dict[str, Any]:
    """`values` in their options' types, unless one can't be or contradicts another; `planned` counts, too."""
    kind = JOBS[job]
    with as_typed(kind):
        chosen = checks.typed(kind, values)
        checks.check_options(checks.complete(kind, chosen | checks.typed(kind, planned)), chosen)
    for name, value in chosen.items():
        if isinstance(value, str):
            quoting.checked(value, options(kind)[name].flag)
    return chosen


def _legacy(layout: Layout, axes: Axes) -> tuple[Layout, str]:
    """The layout of legacy files, whose experts are cut as upstream does unless told, and its name."""
    if axes.expert_tensor is None:
        layout = replace(layout, expert_tensor=layout.tensor)
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "EP": layout.expert}
    if layout.expert_tensor != layout.tensor:
        sizes["ETP"] = layout.expert_tensor
    return layout, "legacy-" + "".join(f"{axis}{size}" for axis, size in sizes.items())


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
    """Processes a node that copy weights: one is enough for this machine's disk, and a parallel file system needs
    several.
    """
    if given is not None and given < 1:
        raise UsageError(f"--processes: {given} must be at least 1")
    return given or (1 if profile.is_local else CONVERTERS)


def _with_base(profile: ClusterProfile, chosen: dict[str, Any]) -> dict[str, Any]:
    """The base of adapters may be named as any model is."""
    return chosen | {"base": paths.weights(profile, chosen["base"], "--base")} if "base" in chosen else chosen


def _gpus(profile: ClusterProfile, placement: Placement) -> int:
    return placement.tasks_per_node if profile.node.gpus else 0


def _serve_preset(profile: ClusterProfile, axes: Axes, shape: MixtralShape | None) -> Layout:
    """Pipeline stages, unless nothing was asked for and NVLink joins two GPUs that can share every matrix."""
    if profile.is_local:
        return Layout()
    joined = (profile.node.nvlink_domain or profile.node.gpus) > 1
    cut = (
        (shape.num_key_value_heads % 2, shape.num_attention_heads % 2, shape.intermediate_size % 128)
        if shape
        else ()
    )
    return SERVE_BY_NVLINK if axes == Axes() and joined and cut and not any(cut) else SERVE_ON_SLURM
