"""A run's options in megatron-core's words: the fields of its model configuration that follow from ours.

What contradicts itself is an error that says so, before anything is loaded.
"""

from typing import Any

import torch

from megatron_mixtral.errors import InputError, LayoutError
from megatron_mixtral.mcore import compat
from megatron_mixtral.spec.jobs import FinetuneConfig, MixtralShape

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def check(config: FinetuneConfig) -> None:
    """`InputError` for options that contradict each other or don't exist."""
    if config.precision not in ("bf16", "fp32"):
        raise InputError(f"precision: {config.precision!r} isn't one of bf16, fp32")
    if config.min_lr > config.lr:
        raise InputError(f"lr: {config.lr:g} is below min_lr, {config.min_lr:g}, where it ends")
    if config.recompute not in RECOMPUTE:
        raise InputError(f"recompute: {config.recompute!r} isn't one of {', '.join(RECOMPUTE)}")
    if config.packing not in (None, "stream", "documents", "none"):
        raise InputError(f"packing: {config.packing!r} isn't one of stream, documents, none")
    context = config.layout.context
    if context > 1 and config.sequence_length % (2 * context * config.layout.tensor):
        raise LayoutError(
            f"sequence_length {config.sequence_length} doesn't divide into 2 stretches for each of context "
            f"{context} x tensor {config.layout.tensor} ranks"
        )
    _check_interleaving(config)
    _check_fp8(config)
    if config.drop_policy not in ("probs", "position"):
        raise InputError(f"drop_policy: {config.drop_policy!r} isn't one of probs, position")
    if not config.capacity_factor and (config.pad_to_capacity or config.drop_policy != "probs"):
        raise InputError("pad_to_capacity, drop_policy: experts have no capacity unless capacity_factor gives one")


def model_options(config: FinetuneConfig, shape: MixtralShape) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig."""
    options: dict[str, Any] = {**RECOMPUTE[config.recompute]}
    if config.capacity_factor:
        _check_padding(config, shape)
        options["moe_expert_capacity_factor"] = config.capacity_factor
        options["moe_pad_expert_input_to_capacity"] = config.pad_to_capacity
        options["moe_token_drop_policy"] = config.drop_policy
    if config.fp8 != "none":
        options |= {"fp8": config.fp8, "fp8_recipe": config.fp8_recipe}
    if config.z_loss:
        options["moe_z_loss_coeff"] = config.z_loss
    if config.router_fp32:
        options["moe_router_dtype"] = "fp32"
    if config.virtual_pipeline > 1:
        options |= interleaved(config, shape.num_hidden_layers)
    if config.first_stage_layers or config.last_stage_layers:
        stages = stage_layers(config, shape.num_hidden_layers)
        layers = [["decoder"] * count for count in stages]
        options["pipeline_model_parallel_layout"] = [
            ["embedding", *layers[0]],
            *layers[1:-1],
            [*layers[-1], "loss"],
        ]
    return options


def _check_padding(config: FinetuneConfig, shape: MixtralShape) -> None:
    """`InputError` for experts that would have to be filled up with more tokens than there are."""
    experts, chosen = shape.num_local_experts, shape.num_experts_per_tok
    if config.pad_to_capacity and config.capacity_factor > experts / chosen:
        raise InputError(
            f"capacity_factor {config.capacity_factor:g}: with pad_to_capacity at most {experts} experts / "
            f"{chosen} a token = {experts / chosen:g}, where each gets every token"
        )


def _check_fp8(config: FinetuneConfig) -> None:
    """`InputError` where FP8 is asked for and can't be had: nothing else is computed in its place."""
    if config.fp8 not in ("none", "hybrid", "e4m3"):
        raise InputError(f"fp8: {config.fp8!r} isn't one of none, hybrid, e4m3")
    if config.fp8_recipe not in compat.FP8_NEEDS:
        raise InputError(f"fp8_recipe: {config.fp8_recipe!r} isn't one of {', '.join(compat.FP8_NEEDS)}")
    if config.fp8 == "none":
        return
    if config.precision != "bf16":
        raise InputError(f"fp8: goes with precision bf16, not {config.precision}")
    if config.lora:
        raise InputError("fp8: adapters are computed by our own layers, which have none; leave out lora or fp8")
    if missing := compat.fp8_missing(config.fp8_recipe):
        raise InputError(f"fp8: {missing}")


def _check_interleaving(config: FinetuneConfig) -> None:
    chunks, stages = config.virtual_pipeline, config.layout.pipeline
    if chunks < 1:
        raise InputError(f"virtual_pipeline {chunks}: a stage has at least one chunk of layers")
    if chunks > 1 and stages == 1:
        raise LayoutError(
            f"virtual_pipeline {chunks}: there is one pipeline stage, so nothing to interleave; use 1"
        )
    if chunks > 1 and (config.first_stage_layers or config.last_stage_layers):
        raise LayoutError("first_stage_layers, last_stage_layers: chunks of virtual_pipeline are all of one length")


def interleaved(config: FinetuneConfig, layers: int) -> dict[str, Any]:
    """Chunks of layers in turn; `LayoutError` when they don't come out whole."""
    chunks, stages = config.virtual_pipeline, config.layout.pipeline
    if layers % (stages * chunks):
        raise LayoutError(
            f"virtual_pipeline: {layers} layers / (pipeline {stages} x {chunks} chunks) = "
            f"{layers / stages / chunks:.3g} isn't whole"
        )
    # Sent one by one: in a batch, two messages between the same two ranks could be taken for each other.
    apart = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return {"virtual_pipeline_model_parallel_size": chunks, **apart}


def check_rounds(config: FinetuneConfig, replicas: int) -> None:
    """`LayoutError` when a step's micro batches aren't whole rounds of an interleaved pipeline."""
    stages, micro_batches = config.layout.pipeline, config.global_batch // (config.micro_batch * replicas)
    if config.virtual_pipeline > 1 and micro_batches % stages:
        raise LayoutError(
            f"virtual_pipeline: global_batch {config.global_batch} / (micro_batch {config.micro_batch} x "
            f"data parallel {replicas}) = {micro_batches} micro batches / pipeline {stages} isn't whole"
        )


def stage_layers(config: FinetuneConfig, layers: int) -> list[int]:
    """Layers of every pipeline stage where the first or the last has a number of its own."""
    stages, first, last = config.layout.pipeline, config.first_stage_layers, config.last_stage_layers
    if stages < 2:
        raise LayoutError(
            "first_stage_layers, last_stage_layers: there is one pipeline stage, which holds all layers"
        )
    between, rest = stages - bool(first) - bool(last), layers - first - last
    equation = f"{layers} layers - first {first} - last {last} = {rest} for {between} stages of {stages}"
    if rest < between or (rest % between if between else rest):
        raise LayoutError(f"{equation}: not the same whole number, at least 1, for each")
    middle = [rest // between] * between if between else []
    return [*([first] if first else []), *middle, *([last] if last else [])]


def freeze_router(model: torch.nn.Module) -> None:
    """Leave the routers as they are: where tokens go then changes only with what comes in."""
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.requires_grad_(False)
