"""A run's options in megatron-core's words: the fields of its model configuration that follow from ours.

What the model or this machine doesn't allow is an error that says so, before anything is loaded.
"""

from typing import Any

import torch

from megatron_mixtral.errors import InputError
from megatron_mixtral.mcore import compat
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape

RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def check(config: FinetuneConfig) -> None:
    """`InputError` for options that contradict each other, or that can't be had here: nothing replaces them."""
    checks.check(config)
    if config.fp8 != "none" and (missing := compat.fp8_missing(config.fp8_recipe)):
        raise InputError(f"fp8: {missing}")


def model_options(config: FinetuneConfig, shape: MixtralShape) -> dict[str, Any]:
    """Fields of megatron-core's TransformerConfig."""
    options: dict[str, Any] = {**RECOMPUTE[config.recompute]}
    checks.check_capacity(config, shape)
    checks.check_chunks(config.layout, config, shape.num_hidden_layers)
    if config.capacity_factor:
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
        # Sent one by one: in a batch, two messages between the same two ranks could be taken for each other.
        apart = {"overlap_p2p_comm": True, "batch_p2p_comm": False}
        options |= {"virtual_pipeline_model_parallel_size": config.virtual_pipeline, **apart}
    if config.first_stage_layers or config.last_stage_layers:
        stages = config.layout.stages(shape.num_hidden_layers, config.first_stage_layers, config.last_stage_layers)
        layers = [["decoder"] * count for count in stages]
        options["pipeline_model_parallel_layout"] = [
            ["embedding", *layers[0]],
            *layers[1:-1],
            [*layers[-1], "loss"],
        ]
    return options


def freeze_router(model: torch.nn.Module) -> None:
    """Leave the routers as they are: where tokens go then changes only with what comes in."""
    for name, parameter in model.named_parameters():
        if ".router." in name:
            parameter.requires_grad_(False)
