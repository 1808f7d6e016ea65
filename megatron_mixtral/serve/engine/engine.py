"""megatron-core's dynamic engine, built alike in the versions we support, for where our own engine can't serve.

It differs in three methods: sampling (any mix of settings, the same draws on every rank), the log probabilities
of prompts (all logits only in the steps that need them) and cancelling.
"""

import faulthandler
import signal
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_mixtral import mcore
from megatron_mixtral.mcore import compat, cpu, ranks
from megatron_mixtral.serve.engine.attention import use_paged_attention
from megatron_mixtral.serve.engine.sampling import Choice, Sampler, score
from megatron_mixtral.serve.messages import Event, Finish, PromptScores, Request, Token

from megatron.core import parallel_state
from megatron.core.inference import communication_utils
from megatron.core.inference.contexts import dynamic_context
from megatron.core.inference.contexts.dynamic_context import DynamicInferenceContext
from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper
from megatron.core.inference.sampling_params import SamplingParams
from megatron.core.inference.text_generation_controllers.text_generation_controller import TextGenerationController
from megatron.core.models.gpt.gpt_model import GPTModel

with mcore.without_recorders():
    from megatron.core.inference.engines.dynamic_engine import DynamicInferenceEngine

GIB = 1024**3
for _number in (signal.SIGTERM, signal.SIGINT):
    faulthandler.unregister(_number)  # importing the engine makes them print stacks; here they mean a drain
# The context, the wrapped model, and what else the controller and the engine are made with.
Parts = tuple[DynamicInferenceContext, GPTInferenceWrapper, dict[str, Any], dict[str, Any]]
if not cpu.HAVE_GPU:
    communication_utils._is_cuda = lambda _: None  # it asserts where it could just send
    dynamic_context.triton_append_key_value_cache = None  # Triton may be installed where no GPU is


class Context(DynamicInferenceContext):
    """The paged cache; a step computes the tokens there are, not the next multiple of 64."""

    TOKEN_ROUNDER = 1
    REQUEST_ROUNDER = 1

    def active(self) -> slice:
        return slice(self.paused_request_count, self.total_request_count)

    def only_last_logits(self, yes: bool) -> None:
        self.materialize_only_last_token_logits = yes
        if hasattr(self, "config"):  # from 0.17 on
            self.config.materialize_only_last_token_logits = yes

    def used(self) -> float:
        """Share of the cache's pages in use."""
        pages = self.kv_block_allocator if hasattr(self, "kv_block_allocator") else self.block_allocator
        return 1 - pages.total_avail / (pages.total_count - 1)


class Controller(TextGenerationController):
    """One step of all active requests; what it drew lies in `drawn` and `scored` until the next one."""

    def __init__(self, *args: Any, sampler: Sampler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sampler = sampler
        self.drawn: list[tuple[int, Choice]] = []
        self.scored: list[PromptScores] = []
        self.forwarded = False

    def forget_last_step(self) -> None:
        self.drawn, self.scored, self.forwarded = [], [], False

    @property
    def context(self) -> Context:
        return self.inference_wrapped_model.inference_context

    def _rows(self) -> list[tuple[int, int, int]]:
        """(request, first position, positions) of each active request in this step, in the batch's order."""
        context, active = self.context, self.context.active()
        columns = (context.request_ids, context.request_kv_length_offsets, context.request_query_lengths)
        return list(zip(*(column[active].tolist() for column in columns), strict=True))

    def _wants_scores(self, request: int, first: int) -> bool:
        """Whether this step, from position `first` on, meets prompt tokens that are still to be scored."""
        if request not in self.sampler or not self.sampler[request].request.prompt_logprobs:
            return False
        draws = self.sampler[request]  # an evicted request is read again, but scored once
        return first <= draws.scored < len(draws.request.prompt) - 1

    def _dynamic_step_forward_logits(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        self.forwarded = True
        reads = not self.context.is_decode_only()
        scoring = reads and any(self._wants_scores(request, first) for request, first, _ in self._rows())
        self.context.only_last_logits(not scoring)
        return super()._dynamic_step_forward_logits(input_ids, position_ids)

    def _dynamic_step_sample_logits(self, logits: Tensor | None = None) -> None:
        """The logits come as an argument in 0.16 and lie in a buffer later."""
        logits_tv = (self._all_logits_cuda if logits is None else logits).squeeze(0)
        rows = self._rows()
        if not self.context.materialize_only_last_token_logits:
            self.scored = [scores for row in self._starts(rows) for scores in self._score(logits_tv, *row)]
            last = torch.tensor([count for _, _, count in rows]).cumsum(0) - 1
            logits_tv = logits_tv[last.to(logits_tv.device)]
        partial = self.context.chunked_prefill_request_id
        drawing = [i for i, (request, _, _) in enumerate(rows) if request != partial and request in self.sampler]
        requests = [rows[i][0] for i in drawing]
        choices = self.sampler.choose(logits_tv[drawing], requests) if drawing else []
        self.drawn = list(zip(requests, choices, strict=True))
        tokens = torch.zeros(len(rows), dtype=torch.int64)
        tokens[drawing] = torch.tensor([choice.token for choice in choices], dtype=torch.int64)
        self._sampled_tokens_cuda[: len(rows)] = tokens.to(self._sampled_tokens_cuda.device)

    @staticmethod
    def _starts(rows: list[tuple[int, int, int]]) -> list[tuple[int, int, int, int]]:
        """The rows, each with the place of its first token in the flat batch."""
        at, placed = 0, []
        for request, first, count in rows:
            placed.append((at, request, first, count))
            at += count
        return placed

    def _score(self, logits_tv: Tensor, at: int, request: int, first: int, count: int) -> list[PromptScores]:
        """Log probabilities of the prompt tokens that follow this step's positions."""
        if not self._wants_scores(request, first):
            return []
        draws = self.sampler[request]
        begin, end = draws.scored, min(first + count, len(draws.request.prompt) - 1)
        following = torch.tensor(draws.request.prompt[begin + 1 : end + 1], device=logits_tv.device)
        logits = logits_tv[at + begin - first : at + end - first]
        own, tops = score(logits, following, draws.request.logprobs or 0)
        draws.scored = end
        return [PromptScores(request, own, tops)]


class Engine(DynamicInferenceEngine):
    """Scheduling and the cache's upkeep; `cancel` ends a request with its next step at the latest."""

    def cancel(self, request: int) -> None:
        if request in self.waiting_request_ids and request != self.context.chunked_prefill_request_id:
            self.waiting_request_ids.remove(request)
            self.requests.pop(request)
        elif request in self.requests:
            self.stop_word_finished_request_ids.add(request)

    def _get_and_clear_stop_word_finished_ids(self, active_request_ids: list[int]) -> set[int]:
        """Those that met a stop token as well; a prompt that is still read in parts can't be ended yet."""
        partial = {self.context.chunked_prefill_request_id} & self.stop_word_finished_request_ids
        self.stop_word_finished_request_ids -= partial
        ended = super()._get_and_clear_stop_word_finished_ids(active_request_ids)
        self.stop_word_finished_request_ids |= partial
        sampler = self.controller.sampler
        stopped = {
            request
            for request, choice in self.controller.drawn
            if request in sampler and choice.token in sampler[request].request.stop_tokens
        }
        return ended | (stopped & set(active_request_ids))


class _NoTokenizer:
    """The engine sees token ids only; it would turn every finished answer into text once more."""

    bos = eod = -1

    def detokenize(self, *_: Any, **__: Any) -> str:
        return ""


def build(
    model: GPTModel,
    *,
    requests: int,
    step_tokens: int,
    context_tokens: int,
    page: int,
    cache_bytes: int,
    vocabulary: Callable[[], Sequence[bytes | None]] = list,
) -> Engine:
    """The engine around `model`: at most `requests` at once, `step_tokens` a step, `context_tokens` each.

    Its cache takes `cache_bytes` on this rank, in pages of `page` tokens.
    """
    use_paged_attention(model)
    model.eval()
    build_parts = _parts_016 if compat.VERSION < (0, 17) else _parts_019
    context, wrapper, controller_options, engine_options = build_parts(
        model,
        max_requests=requests,
        max_tokens=max(step_tokens, requests),
        max_sequence_length=context_tokens,
        block_size_tokens=page,
        buffer_size_gb=cache_bytes / GIB,
    )
    controller = Controller(wrapper, _NoTokenizer(), sampler=Sampler(vocabulary), **controller_options)
    return Engine(controller, context, **engine_options)


class Upstream:
    """megatron-core's engine as `replica.Engine` asks for it."""

    def __init__(self, model: GPTModel, **settings: Any) -> None:
        self._model = model
        self._engine = build(model, **settings)
        self._controller = self._engine.controller

    @property
    def sampler(self) -> Sampler:
        return self._controller.sampler

    @property
    def busy(self) -> bool:
        return self._engine.has_unfinished_requests()

    @property
    def cache_used(self) -> float:
        return self._engine.context.used()

    def add(self, request: Request) -> None:
        self._controller.sampler.add(request)
        first = next(iter(request.stop_tokens), -1)  # upstream knows one such token; `Engine` sees to the others
        settings = SamplingParams(
            num_tokens_to_generate=request.max_tokens, termination_id=first, top_k=1, top_p=0.0
        )
        self._engine.add_request(request.id, list(request.prompt), settings)

    def cancel(self, request: int) -> None:
        self._controller.sampler.drop(request)
        self._engine.cancel(request)

    def close(self) -> None: ...

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
        finish: Finish | None = None if not ended else "stop" if choice.token in asked.stop_tokens else "length"
        return Token(request, choice.token, choice.logprob, choice.top, finish)


def _parts_016(model: GPTModel, **sizes: Any) -> Parts:
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import InferenceWrapperConfig

    config = model.config
    context = Context(
        params_dtype=config.params_dtype,
        num_layers=len(model.decoder.layers),
        kv_channels=config.kv_channels,
        num_attention_heads=config.num_query_groups,
        **sizes,
    )
    wrapper_config = InferenceWrapperConfig(
        hidden_size=config.hidden_size,
        params_dtype=config.params_dtype,
        inference_batch_times_seqlen_threshold=-1,
        padded_vocab_size=model.vocab_size,
        inference_max_requests=sizes["max_requests"],
        inference_max_seq_length=sizes["max_sequence_length"],
    )
    wrapper = GPTInferenceWrapper(model, wrapper_config, context)
    pipeline = {"pp_group": parallel_state.get_pipeline_model_parallel_group()}
    return context, wrapper, pipeline, {"random_seed": 0, "enable_chunked_prefill": True}


def _parts_019(model: GPTModel, **sizes: Any) -> Parts:
    from megatron.core.inference.config import InferenceConfig

    # The default reserves NVLink multicast buffers, for a dispatcher that our layers don't use.
    model.config.inference_moe_token_dispatcher_type = "nccl"
    context = Context(model.config, InferenceConfig(enable_chunked_prefill=True, **sizes))
    return context, GPTInferenceWrapper(model, context), {}, {}
