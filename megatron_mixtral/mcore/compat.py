"""The one place that knows megatron-core's versions, except its engine's, which `serve.engine.engine` knows.

Functions here hide differences between versions. The table `PATCHES` corrects its behaviour.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from megatron_mixtral.mcore import cpu, pickles

import megatron.core
from megatron.core.dist_checkpointing import serialization
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.tensor_parallel import layers as tensor_parallel_layers
from megatron.core.tensor_parallel import random
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import get_num_layers_to_build

VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
ENGINE_COUNTS_ON_DEVICE = VERSION >= (0, 19)  # where our forward pass reads the work of a step
# A checkpoint's common part: newer versions keep it among the tensors, and older ones in its own file.
COMMON_AMONG_TENSORS = not hasattr(serialization, "get_default_save_common_strategy")


def _mend_loading_of_adam() -> None:
    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def fill_with_step(self: Any, parameter: Any, values: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
            values = {"step": state["step"], **values}
        fill(self, parameter, values)

    DistributedOptimizer._set_main_param_and_optimizer_states = fill_with_step


def _mend_balancing_loss() -> None:
    attach = TopKRouter.attach_and_log_load_balancing_loss

    def attach_whole(self: Any, *args: Any, valid_token_count: Any, **kwargs: Any) -> Any:
        whole = valid_token_count * self.tp_cp_group.size()
        return attach(self, *args, valid_token_count=whole, **kwargs)

    TopKRouter.attach_and_log_load_balancing_loss = attach_whole


def _define_te_gemm() -> None:
    moe_utils.te_general_gemm = None


def _lend_generator() -> None:
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It would print a line for each layer, because the device's generator is the process's.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)


_aux_share = 1.0


def weigh_aux_loss(share: float) -> None:
    """Scale the routers' losses by `share`, the share of this step's tokens that are learnt."""
    global _aux_share
    _aux_share = share


def _weigh_aux_loss() -> None:
    set_scale = moe_utils.MoEAuxLossAutoScaler.set_loss_scale
    moe_utils.MoEAuxLossAutoScaler.set_loss_scale = staticmethod(lambda scale: set_scale(scale * _aux_share))


class Patch(NamedTuple):
    """A replaced name of another package, for the whole process."""

    what: str
    why: str
    until: str  # the first version that doesn't need it
    needed: bool = False  # at import, here and with these versions
    apply: Callable[[], None] = lambda: None  # nothing where `why` says by whom


NONE_YET, ON_CPU = "none yet", "one that runs without a GPU"
# fmt: off
PATCHES = (
    Patch("torch.cuda",
          "streams, events, generators, factories, collectives that name CUDA work on the CPU (by `cpu`)", ON_CPU),
    Patch("torch.compile",
          "decorates helpers at import: twice the time, and a C++ compiler at the first step; back afterwards "
          "(by `mcore`)", ON_CPU),
    Patch("torch.optim.Adam.step",
          "it and all optimizers' methods import torch._dynamo, 1.5 s a rank, to be left alone by it (by `mcore`)",
          ON_CPU),
    Patch("torch.utils.tensorboard",
          "imported with megatron-core, as wandb is, 0.4 s a rank, and never used; back afterwards (by `mcore`)",
          NONE_YET),
    Patch("torch.distributed.checkpoint.FileSystemReader.read_metadata",
          "it and DefaultLoadPlanner.load_bytes unpickle what a folder holds, which can run code (by `pickles`)",
          NONE_YET, True, pickles.guard),
    Patch("megatron.core.tensor_parallel.random._get_cuda_rng_state",
          "the process's generator plays the device's, here and in _set_cuda_rng_state",
          ON_CPU, not cpu.HAVE_GPU, _lend_generator),
    Patch("megatron.core.optimizer.distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states",
          "torch's Adam is loaded as it was: `step` isn't looked for among the tensors, where there is none, and "
          "no two parameters share one, which an update would count up once a parameter",
          NONE_YET, True, _mend_loading_of_adam),
    Patch("megatron.core.transformer.moe.router.TopKRouter.attach_and_log_load_balancing_loss",
          "the balancing loss, a sum over tokens, weighs by those of the whole sequence as all else does, not by "
          "this tensor-parallel rank's: with 2 ranks a coefficient of 0.01 acted as 0.005",
          "0.19", VERSION < (0, 19), _mend_balancing_loss),
    Patch("megatron.core.transformer.moe.moe_utils.te_general_gemm",
          "without Transformer Engine the name is read and isn't defined",
          "0.17", not hasattr(moe_utils, "te_general_gemm"), _define_te_gemm),
    Patch("megatron.core.transformer.moe.moe_utils.MoEAuxLossAutoScaler.set_loss_scale",
          "what routers add for every token is divided by the learnt ones: with one token in four learnt it weighs "
          "four times as much as asked for; `weigh_aux_loss` has the share",
          NONE_YET, True, _weigh_aux_loss),
    Patch("megatron.core.tensor_parallel.layers.fused_weight_gradient_mlp_cuda",
          "weight gradients are added in place by our kernel, without Apex (by `accumulate_in_place`)", NONE_YET),
    Patch("megatron.core.optimizer.clip_grads.l2_norm_impl",
          "gradient norms in a few kernels; without Transformer Engine each tensor's is waited for (by "
          "`norms_without_waiting`)", NONE_YET),
    Patch("megatron.core.transformer.attention.HAVE_FA3",
          "asserted before a method that we answer without that package (by `serve.engine.attention`)", NONE_YET),
    Patch("megatron.core.inference.communication_utils._is_cuda",
          "asserts that a tensor is on a GPU where it could just send it (by `serve.engine.engine`)", ON_CPU),
    Patch("megatron.core.inference.contexts.dynamic_context.triton_append_key_value_cache",
          "Triton may be installed where no GPU is (by `serve.engine.engine`)", ON_CPU),
    Patch("megatron.core.parallel_state._DATA_PARALLEL_GROUP_GLOO",
          "it and its like are made for NCCL's sake; on CPU the groups themselves are gloo (by `ranks`)", ON_CPU),
)
# fmt: on
for _patch in PATCHES:
    if _patch.needed:
        _patch.apply()


def have_transformer_engine() -> bool:
    """Whether megatron-core found Transformer Engine; its layers are used then."""
    return bool(gpt_layer_specs.HAVE_TE)


FP8_NEEDS = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}  # compute capability


def fp8_missing(recipe: str) -> str | None:
    """Why matmuls in FP8 aren't possible here; None if Transformer Engine and the GPU can do them."""
    if not have_transformer_engine():
        return "needs Transformer Engine, which isn't installed where the job runs"
    if not cpu.HAVE_GPU:
        return "needs a GPU, and there is none here"
    found, needed = torch.cuda.get_device_capability(), FP8_NEEDS[recipe]
    if found < needed:
        has, wants = (".".join(map(str, capability)) for capability in (found, needed))
        return (
            f"{torch.cuda.get_device_name()} has compute capability {has}; recipe {recipe} needs {wants} or newer"
        )
    return None


def transformer_engine_block(config: Any, *, vp_stage: int | None) -> Any:
    """Transformer Engine's own layers for this pipeline stage."""
    return gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)


def moe_spec(layer: type, **parts: Any) -> Any:
    """megatron-core's router and dispatcher around `parts`: a specification in 0.16, a builder since."""
    submodules = MoESubmodules(**parts)
    if hasattr(transformer_layer, "MlpBuilder"):
        return partial(layer, submodules=submodules)
    return ModuleSpec(module=layer, submodules=submodules)


def accumulate_in_place(model: torch.nn.Module, extension: Any) -> None:
    """Let linear layers add weight gradients to `main_grad` with `extension`, in place of the CUDA extension that
    upstream uses.
    """
    tensor_parallel_layers.fused_weight_gradient_mlp_cuda = extension
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True  # type: ignore[assignment]


def norms_without_waiting() -> None:
    """Compute the gradient norms of all tensors in a few kernels; upstream without Transformer Engine waits for
    each tensor.
    """

    def l2_norm(_: int, __: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
        assert not per_tensor
        return torch.stack(torch._foreach_norm(lists[0])).norm().unsqueeze(0), None

    if clip_grads.l2_norm_impl is megatron.core.utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def model_shards(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """A DistributedOptimizer's fp32 shards, each with its slice of the model's bf16 buffer."""
    shards = {}
    groups = zip(optimizer.shard_fp32_from_float16_groups, optimizer.model_float16_groups, strict=True)
    for main, parameter in (pair for group in groups for pair in zip(*group, strict=True)):
        place = optimizer._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
        buffer, _, bucket = optimizer.model_param_gbuf_map[parameter]
        data = optimizer.buffers[buffer].buckets[bucket].param_data
        shards[main] = data.view(-1)[place.start : place.end]
    return shards


def layers_of_stage(config: Any, *, vp_stage: int | None) -> int:
    """How many layers this pipeline stage holds."""
    return int(get_num_layers_to_build(config, vp_stage=vp_stage))


def take_aux_loss() -> float:
    """This rank's load-balancing losses since the last call, summed over its layers and micro batches."""
    try:
        from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # newer than 0.16
    except ImportError:
        from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

        values = get_moe_layer_wise_logging_tracker().get("load_balancing_loss", {}).get("values")
    else:
        values = getattr(get_moe_metrics_tracker().metrics.get("load_balancing_loss"), "values", None)
    if values is None:
        return 0.0
    total = float(values.sum())
    values.zero_()
    return total
