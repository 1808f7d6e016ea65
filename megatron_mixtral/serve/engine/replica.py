"""One copy of the model and its engine on the ranks that share it: requests in, a step at a time, events out.

All ranks of a replica make the same calls in the same order; each then knows the same tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from megatron_mixtral.mcore import cpu, ranks
from megatron_mixtral.serve.engine import engine
from megatron_mixtral.serve.engine.sampling import Choice
from megatron_mixtral.serve.messages import Event, Finish, Request, Token

from megatron.core import parallel_state
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What one replica holds at once, in requests and tokens."""

    requests: int
    context_tokens: int  # a prompt and its answer
    step_tokens: int = 2048  # longer prompts are read in parts
    page: int = 256
    cache_tokens: int | None = None  # None: every request at its longest, as far as memory goes


class Replica:
    """The engine of this rank's replica."""

    def __init__(
        self, model: GPTModel, sizes: Sizes, vocabulary: Callable[[], Sequence[bytes | None]] = list
    ) -> None:
        self._model = model
        self._engine = engine.build(
            model,
            requests=sizes.requests,
            step_tokens=sizes.step_tokens,
            context_tokens=sizes.context_tokens,
            page=sizes.page,
            cache_bytes=_cache_bytes(model, sizes),
            vocabulary=vocabulary,
        )
        self._controller = self._engine.controller

    @property
    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    @property
    def cache_used(self) -> float:
        return self._engine.context.used()

    def add(self, request: Request) -> None:
        self._controller.sampler.add(request)
        settings = SamplingParams(
            num_tokens_to_generate=request.max_tokens, termination_id=request.stop_token, top_k=1, top_p=0.0
        )
        self._engine.add_request(request.id, list(request.prompt), settings)

    def cancel(self, request: int) -> None:
        self._controller.sampler.drop(request)
        self._engine.cancel(request)

    def step(self) -> list[Event]:
        """One step of all active requests; what it brought, for those that weren't cancelled."""
        self._controller.forget_last_step()
        result = self._engine.step_modern()
        if not self._controller.forwarded and self._model.config.expert_model_parallel_size > 1:
            self.idle_step()  # everything was cancelled meanwhile, but the other replicas wait for this one
        ended = {record.request_id for record in result["finished_request_records"]}
        self._engine.stop_word_finished_request_ids -= ended
        events: list[Event] = list(self._controller.scored)
        events += [self._token(request, choice, request in ended) for request, choice in self._controller.drawn]
        for request in ended:
            self._controller.sampler.drop(request)
        return events

    @torch.inference_mode()
    def idle_step(self) -> None:
        """Take part in the experts' exchange with one token of no request, while other replicas have work."""
        count = self._model.config.tensor_model_parallel_size
        tokens = torch.zeros((1, count), dtype=torch.long, device=ranks.device())
        if not parallel_state.is_pipeline_first_stage():
            share = 1 if self._model.config.sequence_parallel else count
            shape = (share, 1, self._model.config.hidden_size)
            self._model.set_input_tensor(
                torch.zeros(shape, dtype=self._model.config.params_dtype, device=ranks.device())
            )
        self._model(tokens, tokens, None, runtime_gather_output=True)

    def _token(self, request: int, choice: Choice, ended: bool) -> Token:
        asked = self._controller.sampler[request].request
        if asked.max_tokens == 0:  # the engine always draws one
            return Token(request, None, finish="length")
        finish: Finish | None = None if not ended else "stop" if choice.token == asked.stop_token else "length"
        return Token(request, choice.token, choice.logprob, choice.top, finish)


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
        wanted = min(wanted, int(torch.cuda.mem_get_info()[0] * 0.85))
    return wanted
