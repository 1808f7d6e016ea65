"""Describes a plan and its outlook for people and for programs: equation, batch, bubble, fabric, memory.

`require` is the last check before a submission: a job that memory can't hold is refused, unless it is forced.
"""

import os
from collections.abc import Iterator
from typing import Any

from launcher.common import words
from launcher.errors import LayoutError
from launcher.planning import memory, requeue, secrets, suggest
from launcher.planning.fit import Exchange, Outlook, gpu_bytes, itemized
from launcher.planning.memory import GIB, ServingWork, TrainingWork
from launcher.planning.plan import JobPlan
from megatron_mixtral.spec.layout import Layout

IN_JSON = {"sequence_length": "sequence", "max_batch": "requests", "max_tokens": "tokens"}  # as programs know them
Facts = list[tuple[str, str]]


def plan_facts(plan: JobPlan) -> Facts:
    """A plan in a few lines: where, how many, how cut, how long."""
    profile = plan.profile
    spread = (
        f"{plan.world} on this machine"
        if profile.is_local
        else f"{plan.world} = {words.plural(plan.nodes, 'node')} x {plan.tasks_per_node}"
    )
    parallel = plan.layout is not None and plan.job in ("finetune", "serve")
    return [
        ("cluster", f"{profile.name} ({profile.description})" if profile.description else profile.name),
        ("through", profile.host.name),
        ("ranks", spread),
        ("layout", plan.layout.describe(plan.world) if plan.layout and parallel else ""),
        ("limit", "" if profile.is_local else plan.time),
        ("retried", requeue.when(plan)),
        *_inputs(plan),
        *(("output", path) for path in plan.outputs),
        ("secrets", ", ".join(map(_with_value, secrets.carried(plan)))),
    ]


def _inputs(plan: "JobPlan") -> Iterator[tuple[str, str]]:
    there = plan.profile.host.known([given.path for given in plan.inputs])
    for given, found in zip(plan.inputs, there, strict=True):
        yield given.what, f"{given.path}  (isn't there)" if found is False else given.path


def _with_value(name: str) -> str:
    return name if os.environ.get(name) else f"{name} (isn't set)"


def facts(outlook: Outlook) -> Facts:
    """Names and values, one a line; lines without content are left out."""
    if outlook.request.work is None:
        return [*_equation(outlook), *_whole_model(outlook)]
    return [*_equation(outlook), *_batch(outlook), *_fabric(outlook), *_memory(outlook)]


def _equation(outlook: Outlook) -> Facts:
    layout, shape = outlook.request.layout, outlook.request.shape
    tensor, pipeline, expert = f"TP {layout.tensor}", f"PP {layout.pipeline}", f"EP {layout.expert}"
    found: Facts = []
    if outlook.request.work:
        axes = f"{tensor} x {pipeline} x CP {layout.context} x DP {outlook.data}"
        found.append(("world", f"{outlook.world} = {axes}"))
        axes = f"ETP {layout.expert_tensor} x {expert} x {pipeline} x expert DP {outlook.expert_data}"
        found.append(("for experts", f"{outlook.world} = {axes}"))
    if shape:
        experts = shape.num_local_experts
        found.append(("experts / EP", f"{experts} / {layout.expert} = {experts // layout.expert} a rank"))
        found.append(("layers / PP", f"{shape.num_hidden_layers} / {layout.pipeline} = {_stages(outlook.stages)}"))
    return found


def _whole_model(outlook: Outlook) -> Facts:
    """The weights: nothing else matters for a layout that is only written to files."""
    layout, shape = outlook.request.layout, outlook.request.shape
    if shape is None:
        return []
    size = memory.BYTES["bf16"]
    whole = size * sum(memory.parameters(shape, Layout(), 0))
    ranks = (sum(memory.parameters(shape, layout, stage, outlook.stages)) for stage in range(layout.pipeline))
    largest = size * max(ranks)
    return [("weights", f"{whole / GIB:.1f} GiB in bf16, {largest / GIB:.1f} on the fullest rank of this layout")]


def _stages(stages: tuple[int, ...]) -> str:
    """`8 a stage`, or how many in which."""
    if len(set(stages)) == 1:
        return f"{stages[0]} a stage"
    return f"{', '.join(map(str, stages))} by stage"


def _batch(outlook: Outlook) -> Facts:
    batch, pipeline = outlook.request.work, outlook.request.layout.pipeline
    if not isinstance(batch, TrainingWork):
        return []
    rounds = f"micro batch {batch.micro_batch} x DP {outlook.data} x {outlook.micro_batches} micro batches"
    found = [
        ("global batch", f"{batch.global_batch} = {rounds}"),
        ("tokens a step", f"{outlook.tokens_a_step:,} = {batch.global_batch} x {batch.sequence_length}"),
    ]
    if pipeline > 1:
        chunks = f" x {batch.virtual_pipeline} chunks" if batch.virtual_pipeline > 1 else ""
        waits = f"(PP {pipeline} - 1) / ({outlook.micro_batches} micro batches{chunks} + PP {pipeline} - 1)"
        found.append(("bubble", f"{outlook.bubble:.1%} of a step = {waits}"))
    return found


def _fabric(outlook: Outlook) -> Facts:
    return [(f"{e.axis} traffic", exchange_text(e)) for e in outlook.exchanges]


def exchange_text(exchange: Exchange) -> str:
    """Where the traffic of one axis goes, and what it costs if it crosses the fabric."""
    group = f"each group of {exchange.ranks} ranks"
    if exchange.islands == 1:
        return f"{group} inside one NVLink domain"
    said = f"warning: {group} spans {exchange.islands} NVLink domains"
    if exchange.token_bytes:
        said += f": {exchange.token_bytes / 1024:.0f} KiB a token and layer over the fabric"
    if exchange.step_bytes:
        said += f", {exchange.step_bytes / GIB:.0f} GiB a GPU and step"
    if exchange.step_seconds is not None:
        said += f", about {exchange.step_seconds:.1f} s"
    return said


def _memory(outlook: Outlook) -> Facts:
    fullest, gpu = outlook.fullest, gpu_bytes(outlook.request)
    if fullest is None:
        return [("memory", f"not checked: {outlook.unchecked}")] if outlook.unchecked else []
    of = f" of {gpu / GIB:g}" if gpu else ""
    stage = f", stage {fullest.stage + 1} of {len(outlook.usage)}" if len(outlook.usage) > 1 else ""
    found = [("GPU memory", f"{fullest.total / GIB:.1f}{of} GiB{stage}: {itemized(fullest)}")]
    if isinstance(work := outlook.request.work, ServingWork):
        found += _cache(outlook, work)
    if outlook.unchecked:
        return [*found, ("memory", f"not checked: {outlook.unchecked}")]
    return [*found, ("verdict", "DOESN'T FIT" if outlook.shortage else "tight" if outlook.tight else "fits")]


def _cache(outlook: Outlook, work: ServingWork) -> Facts:
    layout, shape, room = outlook.request.layout, outlook.request.shape, outlook.cache_room
    assert shape is not None
    a_token = max(memory.cache_bytes(shape, layout, work.precision, s) for s in range(layout.pipeline))
    wanted = f"{work.max_batch} requests x {work.max_tokens} tokens"
    said = f"{a_token / 1024:.0f} KiB a token; {wanted} want {work.cache_tokens:,}"
    return [("KV cache", said if room is None else f"{said}, there is room for {max(room, 0):,}")]


def as_json(outlook: Outlook) -> dict[str, Any]:
    """Everything, in plain numbers: bytes, shares, seconds."""
    layout, gpu = outlook.request.layout, gpu_bytes(outlook.request)
    return {
        "fits": not outlook.shortage,
        "shortage": outlook.shortage or None,
        "tight": outlook.tight or None,
        "memory_unchecked": outlook.unchecked or None,
        "layout": {**vars(layout), "data": outlook.data, "expert_data": outlook.expert_data},
        "layers_a_stage": list(outlook.stages),
        "micro_batches": outlook.micro_batches,
        "tokens_a_step": outlook.tokens_a_step,
        "bubble": outlook.bubble,
        "exchanges": [vars(exchange) for exchange in outlook.exchanges],
        "gpu_bytes": gpu,
        "stages": [{"stage": u.stage, "total": u.total, **u.parts} for u in outlook.usage],
        "cache_room_tokens": outlook.cache_room,
        "nearest": [suggestion_json(s) for s in suggest.find(outlook.request)] if outlook.shortage else [],
    }


def refusal_json(error: LayoutError) -> dict[str, Any]:
    """An impossible layout, and the nearest possible ones."""
    if isinstance(error, suggest.Refused):
        return {"error": error.reason, "nearest": list(map(suggestion_json, error.suggestions))}
    return {"error": str(error), "nearest": []}


def suggestion_json(suggestion: suggest.Suggestion) -> dict[str, Any]:
    """One of the nearest layouts."""
    outlook = suggestion.outlook
    return {
        "options": suggestion.options,
        "changes": {IN_JSON.get(name, name): value for name, value in suggestion.changes.items()},
        "world": outlook.world,
        "bubble": outlook.bubble,
        "bytes": outlook.fullest.total if outlook.fullest else None,
    }


def remarks(plan: JobPlan) -> Iterator[str]:
    """Warnings that don't stop a submission."""
    outlook = plan.outlook
    if outlook is None or outlook.request.work is None:
        return
    if outlook.shortage:
        yield f"it doesn't fit: {outlook.shortage}"
    if outlook.tight:
        yield f"memory is tight: {outlook.tight}"
    if outlook.unchecked and outlook.request.cluster.node.gpus:
        yield f"memory isn't checked: {outlook.unchecked}"
    yield from (
        f"{e.axis} traffic: {exchange_text(e).removeprefix('warning: ')}"
        for e in outlook.exchanges
        if e.islands > 1
    )


def require(plan: JobPlan, *, force: bool) -> None:
    """`LayoutError` with the numbers and the nearest layouts when memory can't hold `plan`, unless forced."""
    outlook = plan.outlook
    if outlook is None or not outlook.shortage or force:
        return
    forced = "This is an estimate: --force submits anyway."
    raise suggest.Refused(f"it doesn't fit: {outlook.shortage}", suggest.find(outlook.request), forced)
