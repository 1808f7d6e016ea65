"""One copy of the model and its engine on the ranks that share it: requests in, a step at a time, events out.

All ranks of a replica make the same calls in the same order; each then knows the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from megatron_mixtral import kernels
from megatron_mixtral.mcore import cpu
from megatron_mixtral.model.layers import Experts
from megatron_mixtral.serve.messages import Event, Request
from megatron_mixtral.spec.jobs import CACHE_SHARE, PAGE, PROMPT_STEP

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What one replica holds at once, in requests and tokens."""

    requests: int
    context_tokens: int  # a prompt and its answer
    step_tokens: int = PROMPT_STEP
    page: int = PAGE
    cache_tokens: int | None = None  # None: every request at its longest, as far as memory goes


class Engine(Protocol):
    """What steps through requests: ours, or megatron-core's where ours can't."""

    @property
    def busy(self) -> bool: ...

    @property
    def cache_used(self) -> float: ...

    def add(self, request: Request) -> None: ...

    def cancel(self, request: int) -> None: ...

    def step(self) -> list[Event]: ...

    def idle_step(self) -> None: ...

    def close(self) -> None: ...


class Replica:
    """The engine of this rank's replica."""

    def __init__(
        self,
        model: GPTModel,
        sizes: Sizes,
        vocabulary: Callable[[], Sequence[bytes | None]] = list,
        *,
        ours: bool | None = None,
    ) -> None:
        """`ours` asks for our own engine or for megatron-core's; by default ours runs wherever it can on a GPU."""
        settings: dict[str, Any] = {
            "requests": sizes.requests,
            "step_tokens": sizes.step_tokens,
            "context_tokens": sizes.context_tokens,
            "page": sizes.page,
            "cache_bytes": _cache_bytes(model, sizes),
            "vocabulary": vocabulary,
        }
        reason = missing(model)
        if ours is None:
            ours = cpu.HAVE_GPU and reason is None
            if cpu.HAVE_GPU and reason:
                print(f"serving by megatron-core's own layers, slowly: {reason}", flush=True)
        self.engine: Engine
        if ours:
            from megatron_mixtral.serve.engine import runner  # imports triton

            self.engine = runner.Runner(model, **settings)
        else:
            from megatron_mixtral.serve.engine import engine  # here, too: only one of the two is needed

            self.engine = engine.Upstream(model, **settings)

    @property
    def busy(self) -> bool:
        return self.engine.busy

    @property
    def cache_used(self) -> float:
        return self.engine.cache_used

    def add(self, request: Request) -> None:
        self.engine.add(request)

    def cancel(self, request: int) -> None:
        self.engine.cancel(request)

    def step(self) -> list[Event]:
        """A step of all active requests; what it or the one before it brought, for those that weren't cancelled."""
        return self.engine.step()

    def idle_step(self) -> None:
        """Take part in the experts' exchange without a request, while other replicas have work."""
        self.engine.idle_step()

    def close(self) -> None:
        """Nothing more will be asked; the ranks' groups can be left then."""
        self.engine.close()


def missing(model: GPTModel) -> str | None:
    """Why megatron-core's engine serves `model`; None when ours can."""
    if reason := kernels.missing():
        return reason
    config, shape, own = model.config, model.shape, model.decoder.layers[0].mlp.experts
    if not isinstance(own, Experts):
        return "Transformer Engine's layers are in use"
    if shape.hidden_size % 128 or own.linear_fc2.shape[2] % 64:
        return "the hidden size isn't a multiple of 128, or the experts' width on a rank none of 64"
    if shape.num_local_experts.bit_count() > 1 or config.kv_channels.bit_count() > 1 or config.kv_channels < 16:
        return "the number of experts or the size of a head is no power of two"
    state = parallel_state
    tensor, together = (
        state.get_tensor_model_parallel_group().size(),
        state.get_expert_tensor_and_model_parallel_group().size(),
    )
    if max(tensor, together) % min(tensor, together):
        return f"experts lie on {together} ranks and tensors on {tensor}, of which neither divides the other"
    return None


def _cache_bytes(model: GPTModel, sizes: Sizes) -> int:
    """Bytes of this rank's keys and values: what was asked for, or what fits in most of the GPU's free memory."""
    config = model.config
    heads = config.num_query_groups // config.tensor_model_parallel_size
    a_token = 2 * len(model.decoder.layers) * heads * config.kv_channels * config.params_dtype.itemsize
    pages = -(-sizes.context_tokens // sizes.page)
    tokens = sizes.cache_tokens or sizes.requests * pages * sizes.page
    pages_asked = max(-(-tokens // sizes.page), pages) + 1  # one page belongs to padding
    wanted = pages_asked * sizes.page * a_token
    if cpu.HAVE_GPU:
        wanted = min(wanted, int(torch.cuda.mem_get_info()[0] * CACHE_SHARE))
    return wanted
