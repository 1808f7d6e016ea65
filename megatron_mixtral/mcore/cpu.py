"""Replaces CUDA in a process without a GPU by patching torch, so code for a GPU runs on CPU.

Streams and events become no-ops, any CUDA device becomes the CPU, and the process's generator replaces the
device's. The patches hold for the whole process and all threads. They cost nothing where no device is named.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._device import _device_constructors

HAVE_GPU = torch.cuda.is_available()
CPU = torch.device("cpu")
_FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "empty_strided", "eye", "full", "full_like", "linspace", "ones",
    "ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros", "zeros_like",
)  # fmt: skip


class _Stream:
    """A stream whose work is always done, because work on CPU is synchronous."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = CPU
        self.cuda_stream = 0

    def wait_stream(self, _: Any) -> None: ...

    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event()


class _Event:
    """An event that has always happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


def _on_cpu(value: Any) -> Any:
    """A device argument for this machine: any CUDA device becomes the CPU."""
    cuda = (isinstance(value, str) and value.startswith("cuda")) or (
        isinstance(value, torch.device) and value.type == "cuda"
    )
    return CPU if cuda else value


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
    # A separate function for each name, because torch._dynamo refuses one function under two names.
    cuda.current_stream = lambda *_, **__: the_stream
    cuda.default_stream = lambda *_, **__: the_stream
    cuda.stream = lambda *_, **__: nullcontext()
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.current_device = lambda: CPU
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    # The process's generator replaces the device's: seeds and states go to it.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _substitute_tensors() -> None:
    """Wrap every factory and move that can name CUDA; other code isn't slowed down."""
    # `with torch.device(...)` lists the factories at first use and compares identities, so it must list the real
    # ones first.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _redirected(getattr(torch, name)))
    for name in ("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"):
        setattr(torch.Tensor, name, _redirected(getattr(torch.Tensor, name)))

    move, kind = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return move(self, *map(_on_cpu, args), **{k: _on_cpu(v) for k, v in kwargs.items()})

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # Optimizers sort parameters by their type's name, and know only CUDA's names.
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
        """Split sizes are tensors in code for a GPU; gloo needs lists."""
        outputs = kwargs.pop("output_split_sizes", outputs)
        inputs = kwargs.pop("input_split_sizes", inputs)
        as_list = [x.tolist() if hasattr(x, "tolist") else x for x in (outputs, inputs)]
        return exchange(output, given, *as_list, **kwargs)

    dist.all_to_all_single = all_to_all_single  # type: ignore[assignment]


def install() -> None:
    """Put everything in place; once, before any module of megatron-core is imported."""
    _substitute_streams(torch.cuda)
    _substitute_tensors()
    _substitute_collectives()
