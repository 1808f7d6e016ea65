"""The one place that knows megatron-core's versions (but for its engine's, which `serve.dynamic` knows).

It also brings what stands in for CUDA where no GPU is visible. Import it before `megatron.core`; `initialize` then
joins the process group that the environment describes, lays the model-parallel groups over it and seeds the ranks,
with NCCL on GPUs and gloo on CPU.
"""

import gc
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral.errors import JobError
from megatron_mixtral.mcore import cpu
from megatron_mixtral.spec.jobs import Layout

HAVE_GPU = torch.cuda.is_available()


@contextmanager
def quiet() -> Iterator[None]:
    """Without megatron-core's warnings about packages that we do without, and torch's about what it calls."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _uncompiled() -> Iterator[None]:
    """While megatron-core is imported on CPU: no torch.compile.

    Its helpers are decorated with it, which alone doubles the import time and would need a C++ compiler at the
    first step; where there is no GPU they run as written.
    """
    compiler = torch.compile
    if not HAVE_GPU:
        torch.compile = lambda function=None, **_: function if function else (lambda f: f)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler  # type: ignore[assignment]


@contextmanager
def without_recorders() -> Iterator[None]:
    """While megatron-core is imported: it takes them along, 0.4 s a rank, for records that are kept elsewhere."""
    absent = [name for name in ("torch.utils.tensorboard", "wandb") if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def _leave_dynamo_out() -> None:
    """Optimizers' methods import torch._dynamo, a second and a half a rank, to tell it to leave them alone.

    It isn't used on CPU: mark them as told already.
    """
    for method in vars(torch.optim.Optimizer).values():
        if (plain := getattr(method, "__wrapped__", None)) is not None:
            plain.__dynamo_disable = plain
    torch.optim.Adam.step = torch.no_grad()(torch.optim.Adam.step.__wrapped__)  # type: ignore[method-assign]


def _import_megatron() -> None:
    if not HAVE_GPU:
        assert "megatron.core" not in sys.modules, "import megatron_mixtral.mcore.compat before megatron.core"
        cpu.install()
        _leave_dynamo_out()
    with quiet(), _uncompiled(), without_recorders():
        import megatron.core.distributed
        import megatron.core.jit
        import megatron.core.models.gpt.gpt_layer_specs
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.tensor_parallel
    if not HAVE_GPU:
        megatron.core.jit.disable_jit_fuser()  # for the modules still to be imported


os.environ.setdefault("NO_VCS_VERSION", "1")  # newer ones ask git for their version, a process a rank
_import_megatron()

import megatron.core  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.dist_checkpointing import serialization  # noqa: E402
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.optimizer import clip_grads  # noqa: E402
from megatron.core.tensor_parallel import layers as tensor_parallel_layers  # noqa: E402
from megatron.core.tensor_parallel import random as _random  # noqa: E402
from megatron.core.transformer import transformer_layer  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import get_num_layers_to_build  # noqa: E402


def _mend_loading_of_adam() -> None:
    """Restore torch's Adam as it was: megatron-core looks for a `step` among the tensors, where there is none.

    It also gives all parameters one step counter, which an update would then count up once a parameter. With
    another Adam (Transformer Engine, Apex) there is no such state and nothing changes.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def fill_with_step(self: Any, parameter: Any, values: dict[str, Any]) -> None:
        group, order = self.model_param_group_index_map[parameter]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
            values = {"step": state["step"], **values}
        fill(self, parameter, values)

    DistributedOptimizer._set_main_param_and_optimizer_states = fill_with_step


_mend_loading_of_adam()

VERSION = tuple(int(part) for part in megatron.core.__version__.split(".")[:2])
ENGINE_COUNTS_ON_DEVICE = VERSION >= (0, 19)  # what a step has to compute, where our own forward pass reads it
# A checkpoint's common part: newer ones keep it among the tensors, older ones in a file of its own.
COMMON_AMONG_TENSORS = not hasattr(serialization, "get_default_save_common_strategy")


def _mend_balancing_loss() -> None:
    """Give the load-balancing loss its whole weight under tensor parallelism, as 0.19 does.

    Where the loss is a sum over tokens, older ones weigh it by the tokens of this rank's share of the sequence, all
    else by those of the whole one: with 2 ranks a coefficient of 0.01 acts as 0.005.
    """
    attach = TopKRouter.attach_and_log_load_balancing_loss

    def attach_whole(self: Any, *args: Any, valid_token_count: Any, **kwargs: Any) -> Any:
        whole = valid_token_count * self.tp_cp_group.size()
        return attach(self, *args, valid_token_count=whole, **kwargs)

    TopKRouter.attach_and_log_load_balancing_loss = attach_whole


if VERSION < (0, 19):
    _mend_balancing_loss()
if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 without Transformer Engine reads the name undefined
    moe_utils.te_general_gemm = None
if not HAVE_GPU:
    _random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    _random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It would report, a line a layer, that the device's generator is the process's.
    logging.getLogger(_random.__name__).setLevel(logging.ERROR)


def weigh_aux_loss(share: float) -> None:
    """Count what routers add to the loss by `share`, the learnt tokens among all of this step's.

    megatron-core adds it for every token and divides by the learnt ones: with one token in four learnt, it weighs
    four times as much as asked for.
    """
    global _aux_share
    _aux_share = share


_aux_share = 1.0
_set_aux_scale = moe_utils.MoEAuxLossAutoScaler.set_loss_scale
moe_utils.MoEAuxLossAutoScaler.set_loss_scale = staticmethod(lambda scale: _set_aux_scale(scale * _aux_share))


def have_transformer_engine() -> bool:
    """Whether megatron-core found Transformer Engine; its layers are used then."""
    return bool(gpt_layer_specs.HAVE_TE)


FP8_NEEDS = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}  # compute capability


def fp8_missing(recipe: str) -> str | None:
    """What stands in the way of products in FP8 here; None when Transformer Engine and the GPU can do them."""
    if not have_transformer_engine():
        return "Transformer Engine computes in FP8, and it isn't installed where the job runs"
    if not HAVE_GPU:
        return "there is no GPU here to compute in it"
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


def moe_spec(experts: type, layer: type = MoELayer) -> Any:
    """megatron-core's router and dispatcher around `experts`: a specification in 0.16, a builder since."""
    parts = MoESubmodules(experts=experts)
    if hasattr(transformer_layer, "MlpBuilder"):
        return partial(layer, submodules=parts)
    return ModuleSpec(module=layer, submodules=parts)


def accumulate_in_place(model: torch.nn.Module, extension: Any) -> None:
    """Let linear layers add weight gradients to `main_grad` by `extension`, as by the CUDA one upstream wants."""
    tensor_parallel_layers.fused_weight_gradient_mlp_cuda = extension
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


def norms_without_waiting() -> None:
    """Gradient norms of all tensors in a few kernels; upstream without Transformer Engine waits for each one's."""

    def l2_norm(_: int, __: Any, lists: list[list[torch.Tensor]], per_tensor: bool) -> tuple[torch.Tensor, None]:
        assert not per_tensor
        return torch.stack(torch._foreach_norm(lists[0])).norm().unsqueeze(0), None

    if clip_grads.l2_norm_impl is megatron.core.utils.local_multi_tensor_l2_norm:
        clip_grads.l2_norm_impl = l2_norm


def model_shards(optimizer: Any) -> dict[torch.Tensor, torch.Tensor]:
    """Of a DistributedOptimizer: each fp32 shard, and the same numbers' place in the model's bf16 buffer."""
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


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if HAVE_GPU else cpu.CPU


def _from_environment() -> tuple[int, int]:
    """(world, local rank) by torch's env:// names; one process alone when the environment says nothing."""
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    if missing := [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
        raise JobError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: each rank needs all of torch's env:// names"
        )
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _join(world: int, timeout: timedelta) -> None:
    backend = "nccl" if HAVE_GPU else "gloo"
    if world == 1:  # nobody to meet: no port is opened
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)


def initialize(layout: Layout, *, seed: int = 1234, timeout: float = 600.0, virtual_pipeline: int = 1) -> None:
    """Join the ranks named by the environment and lay `layout` over them; `timeout` in seconds.

    `LayoutError` with the equation when it doesn't fit, before anything is opened. A second call in one process
    with another layout rearranges the same ranks. `virtual_pipeline` is how many chunks of the model a stage holds.
    """
    world, local_rank = _from_environment()
    layout.data_parallel(world)
    if HAVE_GPU:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        _join(world, timedelta(seconds=timeout))
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline if virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
        create_gloo_process_groups=HAVE_GPU,
    )
    if not HAVE_GPU:
        _lend_gloo_groups()
    seed_ranks(seed)
    gc.freeze()  # a save has the collector run twice, half a second a rank if it looks at all that was imported


def _lend_gloo_groups() -> None:
    """Gloo twins of the data-parallel groups exist for NCCL's sake; on CPU the groups themselves are gloo."""
    state = parallel_state
    state._DATA_PARALLEL_GROUP_GLOO = state._DATA_PARALLEL_GROUP
    state._DATA_PARALLEL_GROUP_WITH_CP_GLOO = state._DATA_PARALLEL_GROUP_WITH_CP
    state._EXPERT_DATA_PARALLEL_GROUP_GLOO = state._EXPERT_DATA_PARALLEL_GROUP
    state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP
    state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO = state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP


def seed_ranks(seed: int) -> None:
    """Seed Python, numpy and torch: alike on data-parallel ranks, apart on those that hold other parameters."""
    import random

    import numpy

    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    _random.model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """Every generator of this rank, to go on drawing where it was."""
    import random

    import numpy

    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": _random._get_cuda_rng_state(),
        "tracker": _random.get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` returned `state`."""
    import random

    import numpy

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    _random._set_cuda_rng_state(state["device"])
    _random.get_cuda_rng_tracker().set_states(state["tracker"])


def shutdown() -> None:
    """Leave the groups; safe to call twice and after a failure elsewhere."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel() -> tuple[int, int]:
    """(rank, size) of this rank among those that train on different samples; context-parallel ranks share one."""
    return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()


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
