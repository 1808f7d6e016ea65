"""Our own engine around our own forward pass: the host plans step n + 1 while the device computes step n.

Tokens stay on the device, where the next step reads them; the host hears of them a step later. Only what can't be
drawn there (penalties, log probabilities, JSON) is waited for. All ranks of a replica make the same calls and plan
the same steps. Shapes: n requests, v vocabulary.
"""

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixtral.errors import JobError
from megatron_mixtral.mcore import cpu, ranks
from megatron_mixtral.serve.engine.batch import Batch
from megatron_mixtral.serve.engine.forward import Step, Work
from megatron_mixtral.serve.engine.sampling import Choice, Sampler, on_device, score
from megatron_mixtral.serve.engine.scheduler import Plan, Scheduler, Sequence
from megatron_mixtral.serve.messages import Event, Finish, PromptScores, Request, Token

from megatron.core.models.gpt import GPTModel


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A step under way: who draws in it, and where the tokens will lie."""

    sequences: list[Sequence]
    rows: list[int]
    tokens: Tensor  # on the host, once `landed`
    landed: Any

    def wait(self) -> list[int]:
        if self.landed is not None:
            self.landed.synchronize()
        tokens: list[int] = self.tokens.tolist()
        return [tokens[row] for row in self.rows]


class Runner:
    """The engine of one rank: `step` gives what the step before the one it starts has brought."""

    def __init__(
        self,
        model: GPTModel,
        *,
        requests: int,
        step_tokens: int,
        context_tokens: int,
        page: int,
        cache_bytes: int,
        vocabulary: Callable[[], Many[bytes | None]] = list,
    ) -> None:
        cache = _cache(model, page, cache_bytes, context_tokens)
        steps = max(step_tokens, requests)
        self.sampler = Sampler(vocabulary)
        self.scheduler = Scheduler(
            slots=requests, pages=cache.shape[2], page=page, context=context_tokens, step_tokens=steps
        )
        self.batch = Batch(
            requests=requests, tokens=steps, pages=-(-context_tokens // page), page=page, device=ranks.device()
        )
        self.forward = Step(model.eval(), self.batch, cache)
        self._sequences: dict[int, Sequence] = {}
        self._flight: Flight | None = None
        self._landing = [torch.zeros(requests, dtype=torch.int32, pin_memory=cpu.HAVE_GPU) for _ in range(2)]
        if cpu.HAVE_GPU:
            self.forward.capture()

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or self._flight is not None

    @property
    def cache_used(self) -> float:
        return self.scheduler.used

    def add(self, request: Request) -> None:
        self.sampler.add(request)
        self._sequences[request.id] = self.scheduler.add(request)

    def cancel(self, request: int) -> None:
        if (sequence := self._sequences.pop(request, None)) is not None:
            self.scheduler.end(sequence)
            self.sampler.drop(request)

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Starts the next step; what the one before has brought, and this one's if it has to be waited for."""
        plan = self.scheduler.plan()
        started = self._start(plan) if plan else None
        if plan is None:
            self._start_idly()
        before, self._flight = self._flight, None
        events = self._landed(before) if before else []
        if plan is None:
            return events
        if started is not None:
            self._flight = started
            return events
        return events + self._scores(plan) + self._drawn_here(plan)

    def close(self) -> None:
        self.forward.close()

    def idle_step(self) -> None:
        """Takes part in a step of others that share experts."""
        with torch.inference_mode():
            self._start_idly()

    def _start_idly(self) -> None:
        if self.forward.replicas.count > 1:
            self.batch.fill(None)
            self.forward.run(Work(requests=0, tokens=0, prompts=False))

    def _start(self, plan: Plan) -> Flight | None:
        """None where what it draws has to be drawn by the host."""
        scored = [place for _, places in self._to_score(plan) for place in places]
        self.batch.fill(plan)
        self.forward.run(
            Work(
                requests=len(plan.sequences),
                tokens=plan.tokens,
                prompts=plan.prompts,
                scored=torch.tensor(scored, device=ranks.device()) if scored else None,
            )
        )
        rows = plan.draws.nonzero()[0].tolist()
        if scored or not all(self._plain(plan.sequences[row]) for row in rows):
            return None
        self._draw_on_device(plan, rows)
        return self._take_off(plan, rows)

    def _plain(self, sequence: Sequence) -> bool:
        return self.sampler[sequence.request.id].plain

    def _draw_on_device(self, plan: Plan, rows: list[int]) -> None:
        """The likeliest have been drawn; in their place what a request's own chance says."""
        random = [row for row in rows if self.sampler[plan.sequences[row].request.id].by_chance]
        if not random:
            return
        device = ranks.device()
        at = on_device(random, torch.long, device)
        logits = self.forward.logits_of(at).float()
        drawn = self.sampler.draw(logits, [plan.sequences[row].request.id for row in random]).int()
        self.forward.tokens.index_copy_(0, at, drawn)
        self.batch.drawn.index_copy_(0, on_device(plan.slots[random].tolist(), torch.long, device), drawn)

    def _take_off(self, plan: Plan, rows: list[int]) -> Flight:
        host = self._landing.pop(0)
        self._landing.append(host)
        count = len(plan.sequences)
        host[:count].copy_(self.forward.tokens[:count], non_blocking=True)
        landed = torch.cuda.Event() if cpu.HAVE_GPU else None
        if landed is not None:
            landed.record()
        tokens = host[:count] if landed is not None else host[:count].clone()
        return Flight(sequences=[plan.sequences[row] for row in rows], rows=rows, tokens=tokens, landed=landed)

    def _landed(self, flight: Flight) -> list[Event]:
        events: list[Event] = []
        for sequence, token in zip(flight.sequences, flight.wait(), strict=True):
            if not sequence.ended:
                events.append(self._event(sequence, Choice(token)))
        return events

    def _event(self, sequence: Sequence, choice: Choice) -> Token:
        request, ended = sequence.request, self.scheduler.took(sequence, choice.token)
        if ended:
            self.sampler.drop(request.id)
            self._sequences.pop(request.id, None)
        if request.max_tokens == 0:  # one is always drawn
            return Token(request.id, None, finish="length")
        finish: Finish | None = None if not ended else "stop" if choice.token in request.stop_tokens else "length"
        return Token(request.id, choice.token, choice.logprob, choice.top, finish)

    def _drawn_here(self, plan: Plan) -> list[Event]:
        """Waits for the logits and draws on the host; the tokens go to the device for the next step."""
        rows = [row for row in plan.draws.nonzero()[0].tolist() if not plan.sequences[row].ended]
        if not rows:
            return []
        device = ranks.device()
        logits = self.forward.logits_of(torch.tensor(rows, device=device))
        choices = self.sampler.choose(logits, [plan.sequences[row].request.id for row in rows])
        tokens = torch.tensor([choice.token for choice in choices], dtype=torch.int32, device=device)
        self.batch.drawn.index_copy_(0, torch.tensor(plan.slots[rows], device=device), tokens)
        pairs = zip(rows, choices, strict=True)
        return [self._event(plan.sequences[row], choice) for row, choice in pairs]

    def _to_score(self, plan: Plan) -> list[tuple[Sequence, range]]:
        """Whose prompt tokens are scored in this step, and the places of the tokens that come before them."""
        if not plan.prompts:
            return []
        found, begins = [], np.cumsum(plan.counts) - plan.counts
        for row, sequence in enumerate(plan.sequences):
            request = sequence.request
            if not request.prompt_logprobs or request.id not in self.sampler:
                continue
            first, done = int(plan.first[row]), self.sampler[request.id].scored
            end = min(first + int(plan.counts[row]), len(request.prompt) - 1)
            if first <= done < end:  # one that gave its pages back is read again, but scored once
                begin = int(begins[row])
                found.append((sequence, range(begin + done - first, begin + end - first)))
        return found

    def _scores(self, plan: Plan) -> list[Event]:
        """Log probabilities of prompt tokens that follow what was read."""
        events: list[Event] = []
        for sequence, places in self._to_score(plan):
            request, draws = sequence.request, self.sampler[sequence.request.id]
            end = draws.scored + len(places)
            device = ranks.device()
            logits = self.forward.scores_of(torch.tensor(list(places), device=device))
            following = torch.tensor(request.prompt[draws.scored + 1 : end + 1], device=device)
            own, tops = score(logits, following, request.logprobs or 0)
            draws.scored = end
            events.append(PromptScores(request.id, own, tops))
        return events


def _cache(model: GPTModel, page: int, cache_bytes: int, context_tokens: int) -> Tensor:
    """[2, layers, pages, positions, groups, D], with as many pages on all ranks as the fullest has room for."""
    config = model.config
    groups = config.num_query_groups // config.tensor_model_parallel_size
    a_page = 2 * len(model.decoder.layers) * page * groups * config.kv_channels * config.params_dtype.itemsize
    pages = torch.tensor([cache_bytes // a_page], device=ranks.device())
    dist.all_reduce(pages, op=dist.ReduceOp.MIN)
    count, least = int(pages), -(-context_tokens // page)
    if count < least:
        raise JobError(
            f"the GPU has room for the keys and values of {count * page} tokens, and a request may have "
            f"{context_tokens}: lower max_tokens, or spread the model over more GPUs"
        )
    shape = (2, len(model.decoder.layers), count, page, groups, config.kv_channels)
    return torch.empty(shape, dtype=config.params_dtype, device=ranks.device())
