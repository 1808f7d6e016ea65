"""What stands in for CUDA in a process without a GPU, so that code written for one runs on CPU: patches of torch.

Streams and events become no-ops, any spelling of a CUDA device becomes the CPU, the process's generator plays the
device's. They hold for the whole process and all its threads, and cost nothing where no device is named.
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
    """One queue in which everything has already happened: work on CPU is synchronous."""

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
    # One function a name: torch._dynamo, should anything import it, refuses the same one under two.
    cuda.current_stream = lambda *_, **__: the_stream
    cuda.default_stream = lambda *_, **__: the_stream
    cuda.stream = lambda *_, **__: nullcontext()
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.current_device = lambda: CPU
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    # The one generator of the process plays the device's: seeds and states go to it.
    cuda.manual_seed = cuda.manual_seed_all = torch.default_generator.manual_seed
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)


def _substitute_tensors() -> None:
    """Every factory and move that names CUDA; wrapping these few costs nothing elsewhere, in any thread."""
    # `with torch.device(...)` knows the factories by identity, listed at first use: it must list the real ones.
    _device_constructors()
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

    dist.all_to_all_single = all_to_all_single  # type: ignore[assignment]


def install() -> None:
    """Put everything in place; once, before any module of megatron-core is imported."""
    _substitute_streams(torch.cuda)
    _substitute_tensors()
    _substitute_collectives()
