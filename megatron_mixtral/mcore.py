"""The one place that knows megatron-core's versions, and what stands in for CUDA where no GPU is visible.

Import it before `megatron.core`; `initialize` then joins the process group that the environment describes, lays the
model-parallel groups over it and seeds the ranks, with NCCL on GPUs and gloo on CPU.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral.config import Layout
from megatron_mixtral.errors import JobError

HAVE_GPU = torch.cuda.is_available()
_CPU = torch.device("cpu")
_FACTORIES = (
    *(
        "arange",
        "as_tensor",
        "empty",
        "empty_like",
        "empty_strided",
        "eye",
        "full",
        "full_like",
        "linspace",
        "ones",
    ),
    *("ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "zeros_like"),
)


class _Stream:
    """One queue in which everything has already happened: work on CPU is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = _CPU
        self.cuda_stream = 0

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()


class _Event:
    """A moment that has passed."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _on_cpu(value: Any) -> Any:
    """A device argument as this machine can honour it: any spelling of CUDA becomes the CPU."""
    cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return _CPU if cuda else value


def _redirected(factory: Callable[..., Any]) -> Callable[..., Any]:
    def on_cpu(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    on_cpu.__name__ = getattr(factory, "__name__", "factory")
    return on_cpu


def _substitute_streams(cuda: Any) -> None:
    the_stream = _Stream()
    cuda.Stream = _Stream
    cuda.Event = _Event
    # One function a name: torch._dynamo, should anything import it, refuses the same one under two.
    cuda.current_stream = lambda *_, **__: the_stream
    cuda.default_stream = lambda *_, **__: the_stream
    cuda.stream = lambda *_, **__: nullcontext()
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.current_device = lambda: _CPU
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    # The one generator of the process plays the device's: seeds and states go to it.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _substitute_tensors() -> None:
    """Every factory and move that names CUDA; wrapping these few costs nothing elsewhere, in any thread."""
    for name in _FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)))

    move, kind = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(self, *map(_on_cpu, args), **{k: _on_cpu(v) for k, v in kwargs.items()})

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Optimizers sort parameters by the name of their type and know CUDA's alone.
        name = kind(self, *args, **kwargs)
        return name if args or kwargs else name.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to  # type: ignore[method-assign,assignment]
    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]


def _substitute_collectives() -> None:
    exchange = dist.all_to_all_single

    def all_to_all_single(output: Any, given: Any, outputs: Any = None, inputs: Any = None, **kwargs: Any) -> Any:
        """Split sizes are tensors where a GPU holds them; gloo wants lists."""
        outputs = kwargs.pop("output_split_sizes", outputs)
        inputs = kwargs.pop("input_split_sizes", inputs)
        as_list = [x.tolist() if hasattr(x, "tolist") else x for x in (outputs, inputs)]
        return exchange(output, given, *as_list, **kwargs)

    dist.all_to_all_single = all_to_all_single
    torch.distributed.all_to_all_single = all_to_all_single


@contextmanager
def quiet() -> Iterator[None]:
    """Without megatron-core's warnings about packages that we do without, and torch's about what it calls."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
        assert "megatron.core" not in sys.modules, "import megatron_mixtral.mcore before megatron.core"
        _substitute_streams(torch.cuda)
        _substitute_tensors()
        _substitute_collectives()
        _leave_dynamo_out()
    with quiet(), _uncompiled():
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
from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.tensor_parallel import random as _random  # noqa: E402
from megatron.core.transformer import transformer_layer  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules  # noqa: E402
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

if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 without Transformer Engine reads the name undefined
    moe_utils.te_general_gemm = None
if not HAVE_GPU:
    _random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    _random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    # It would report, a line a layer, that the device's generator is the process's.
    logging.getLogger(_random.__name__).setLevel(logging.ERROR)


def have_transformer_engine() -> bool:
    """Whether megatron-core found Transformer Engine; its layers are used then."""
    return bool(gpt_layer_specs.HAVE_TE)


def transformer_engine_block(config: Any, *, vp_stage: int | None) -> Any:
    """Transformer Engine's own layers for this pipeline stage."""
    return gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)


def moe_spec(experts: type) -> Any:
    """megatron-core's router and dispatcher around `experts`: a specification in 0.16, a builder since."""
    parts = MoESubmodules(experts=experts)
    if hasattr(transformer_layer, "MlpBuilder"):
        return partial(MoELayer, submodules=parts)
    return ModuleSpec(module=MoELayer, submodules=parts)


def layers_of_stage(config: Any, *, vp_stage: int | None) -> int:
    """How many layers this pipeline stage holds."""
    return int(get_num_layers_to_build(config, vp_stage=vp_stage))


def device() -> torch.device:
    """Where this rank's tensors live."""
    return torch.device("cuda", torch.cuda.current_device()) if HAVE_GPU else _CPU


def save_sharded(content: dict[str, Any], folder: Path, *, content_metadata: dict[str, Any]) -> None:
    """megatron-core's save, written by torch's plain writer within the process.

    Its own writer starts two processes a rank and a manager for their results, for the sake of asynchronous saves.
    """
    from torch.distributed import checkpoint

    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import torch as strategies

    class InProcess(strategies.TorchDistSaveShardedStrategy):
        def save(self, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
            state, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
            checkpoint.save(
                strategies.mcore_to_pyt_state_dict(state, False),
                storage_writer=checkpoint.FileSystemWriter(checkpoint_dir),
                planner=strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
            )

    with quiet():
        dist_checkpointing.save(
            content, str(folder), sharded_strategy=InProcess("torch_dist", 1), content_metadata=content_metadata
        )


def _from_environment() -> tuple[int, int, int]:
    """(rank, world, local rank); one process alone when the environment says nothing."""
    if "WORLD_SIZE" not in os.environ:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
        return 0, 1, 0
    missing = [n for n in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if n not in os.environ]
    if missing:
        raise JobError(
            f"WORLD_SIZE is set but not {', '.join(missing)}: each rank needs all of torch's env:// names"
        )
    return tuple(int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))  # type: ignore[return-value]


def _join(rank: int, world: int, timeout: timedelta) -> None:
    if world == 1:
        store = dist.HashStore()  # nobody to meet: no port is opened
    else:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, world, is_master=rank == 0, timeout=timeout)
    backend = "nccl" if HAVE_GPU else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)


def initialize(layout: Layout, *, seed: int = 1234, timeout: float = 600.0) -> None:
    """Join the ranks named by the environment and lay `layout` over them; `timeout` in seconds.

    `LayoutError` with the equation when it doesn't fit, before anything is opened. A second call in one process
    with another layout rearranges the same ranks.
    """
    rank, world, local_rank = _from_environment()
    layout.data_parallel(world)
    if HAVE_GPU:
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    if not dist.is_initialized():
        _join(rank, world, timedelta(seconds=timeout))
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=layout.expert_tensor,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
        create_gloo_process_groups=HAVE_GPU,
    )
    if not HAVE_GPU:
        _lend_gloo_groups()
    seed_ranks(seed)


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
