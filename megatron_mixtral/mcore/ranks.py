"""This process as a rank: it joins and leaves the process group, and has a device and random numbers.

NCCL connects GPUs, and gloo CPUs. The environment names the ranks of the model-parallel groups.
"""

import gc
import os
import random
from datetime import timedelta
from typing import Any

import numpy
import torch
import torch.distributed as dist

from megatron_mixtral.errors import JobError
from megatron_mixtral.mcore import cpu
from megatron_mixtral.spec.layout import Layout

from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as _random


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if cpu.HAVE_GPU else cpu.CPU


def _from_environment() -> tuple[int, int]:
    """(world, local rank) by torch's env:// names; a single process if the environment has none."""
    if "WORLD_SIZE" not in os.environ:
        return 1, 0
    if missing := [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]:
        raise JobError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: each rank needs all of torch's env:// names"
        )
    return int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])


def _join(world: int, timeout: timedelta) -> None:
    backend = "nccl" if cpu.HAVE_GPU else "gloo"
    if world == 1:  # a single process needs no port
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
    if cpu.HAVE_GPU:
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
        create_gloo_process_groups=cpu.HAVE_GPU,
    )
    if not cpu.HAVE_GPU:
        _lend_gloo_groups()
    seed_ranks(seed)
    gc.freeze()  # a save runs garbage collection twice, which takes half a second a rank with all imported objects


def _lend_gloo_groups() -> None:
    """Gloo copies of the data-parallel groups exist because of NCCL; on CPU the groups themselves are gloo."""
    state = parallel_state
    state._DATA_PARALLEL_GROUP_GLOO = state._DATA_PARALLEL_GROUP
    state._DATA_PARALLEL_GROUP_WITH_CP_GLOO = state._DATA_PARALLEL_GROUP_WITH_CP
    state._EXPERT_DATA_PARALLEL_GROUP_GLOO = state._EXPERT_DATA_PARALLEL_GROUP
    state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP_GLOO = state._INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP
    state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP_GLOO = state._INTRA_PARTIAL_EXPERT_DATA_PARALLEL_GROUP


def seed_ranks(seed: int) -> None:
    """Seed Python, numpy and torch: the same on data-parallel ranks, different on ranks with other parameters."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    _random.model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this rank."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": _random._get_cuda_rng_state(),
        "tracker": _random.get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Undo everything drawn since `random_state` returned `state`."""
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
