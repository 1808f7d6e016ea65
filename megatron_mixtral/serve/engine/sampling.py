"""From logits to the next token of each request in a batch, the same on every rank and in every batch.

A request draws from its own seeded stream and by inverting the cumulative distribution, so neither the company it
keeps in a batch nor the number of ranks changes its tokens.  Shapes: n = requests, v = vocabulary.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.serve.engine.json_grammar import Writer
from megatron_mixtral.serve.messages import Request, Top

REDRAWS = 64
COLDEST = 1e-4  # below it a temperature is greedy: dividing by it would overflow


@dataclass(slots=True)
class Draws:
    """What one request's tokens hang on, and how much of its prompt has been scored."""

    request: Request
    random: random.Random
    counts: Counter[int] = field(default_factory=Counter)
    scored: int = 0  # prompt tokens whose log probability was given out
    writer: Writer | None = None  # of an answer whose form is fixed

    @property
    def shifts_logits(self) -> bool:
        r = self.request
        return bool(r.logit_bias or r.presence_penalty or r.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Whether logits and settings alone say what is drawn, and nothing beside the token is asked for."""
        return not self.shifts_logits and self.writer is None and self.request.logprobs is None

    @property
    def by_chance(self) -> bool:
        return self.request.temperature >= COLDEST and self.request.top_k != 1


@dataclass(frozen=True, slots=True)
class Choice:
    """A drawn token and, when asked for, the model's own log probabilities: before temperature and bias."""

    token: int
    logprob: float | None = None
    top: Top | None = None


class Sampler:
    """Draws tokens for the requests it was told of; greedy where the temperature is 0 or top_k is 1.

    `vocabulary` gives each token's bytes, for answers whose form is fixed.
    """

    def __init__(self, vocabulary: Callable[[], Sequence[bytes | None]] = list) -> None:
        self._draws: dict[int, Draws] = {}
        self._vocabulary = vocabulary

    def add(self, request: Request) -> None:
        writer = Writer(self._vocabulary(), request.stop_tokens) if request.json else None
        self._draws[request.id] = Draws(request, random.Random(request.seed), writer=writer)

    def drop(self, request: int) -> None:
        self._draws.pop(request, None)

    def __contains__(self, request: int) -> bool:
        return request in self._draws

    def __getitem__(self, request: int) -> Draws:
        return self._draws[request]

    def choose(self, logits_nv: Tensor, requests: list[int]) -> list[Choice]:
        """One token for each request, whose logits are the rows in order."""
        draws = [self._draws[request] for request in requests]
        tokens = self._draw(self._shifted(logits_nv.float(), draws), draws)
        for one, token in zip(draws, tokens, strict=True):
            one.counts[token] += 1
        wanted = [i for i, s in enumerate(draws) if s.request.logprobs is not None]
        choices = [Choice(token) for token in tokens]
        if wanted:
            most = max(draws[i].request.logprobs or 0 for i in wanted)
            chosen = torch.tensor([tokens[i] for i in wanted], device=logits_nv.device)
            own, tops = score(logits_nv[wanted], chosen, most)
            for row, i in enumerate(wanted):
                choices[i] = Choice(tokens[i], own[row], tops[row][: draws[i].request.logprobs or 0])
        return choices

    def draw(self, logits_nv: Tensor, requests: list[int]) -> Tensor:
        """Tokens [n] of requests that are plain and draw by chance, without waiting for the device."""
        return self._by_chance(logits_nv, [self._draws[request] for request in requests])

    def _shifted(self, logits_nv: Tensor, draws: list[Draws]) -> Tensor:
        """Penalties for what was said already, and the caller's own bias."""
        rows = [(i, s) for i, s in enumerate(draws) if s.shifts_logits]
        if not rows:
            return logits_nv
        shifted = logits_nv.clone()
        for i, one in rows:
            r = one.request
            shift = {t: -r.presence_penalty - n * r.frequency_penalty for t, n in one.counts.items()}
            for token, bias in r.logit_bias.items():
                shift[token] = shift.get(token, 0.0) + bias
            if shift:
                at = torch.tensor(list(shift), device=logits_nv.device)
                shifted[i, at] += torch.tensor(list(shift.values()), device=logits_nv.device)
        return shifted

    def _draw(self, logits_nv: Tensor, draws: list[Draws]) -> list[int]:
        tokens = self._draw_freely(logits_nv, draws)
        for i, one in enumerate(draws):
            if one.writer:
                tokens[i] = self._fitting(logits_nv[i], one, one.writer, tokens[i])
        return tokens

    def _fitting(self, logits_v: Tensor, one: Draws, writer: Writer, token: int) -> int:
        """`token`, or what is drawn in its place until one fits; after many that don't, the likeliest that does."""
        left_v = logits_v.clone()
        for _ in range(REDRAWS):
            if writer.fits(token):
                break
            left_v[token] = torch.finfo(left_v.dtype).min
            token = self._draw_freely(left_v.unsqueeze(0), [one])[0]
        else:
            order = torch.argsort(left_v, descending=True, stable=True).tolist()
            token = next(token for token in order if writer.fits(token))
        writer.take(token)
        return token

    def _draw_freely(self, logits_nv: Tensor, draws: list[Draws]) -> list[int]:
        tokens_n = logits_nv.argmax(dim=-1)
        if rows := [i for i, one in enumerate(draws) if one.by_chance]:
            at = on_device(rows, torch.long, logits_nv.device)
            tokens_n.index_copy_(0, at, self._by_chance(logits_nv[at], [draws[i] for i in rows]))
        return tokens_n.tolist()

    @staticmethod
    def _by_chance(logits_nv: Tensor, draws: list[Draws]) -> Tensor:
        requests = [one.request for one in draws]
        return inverse_draws(
            logits_nv,
            temperature=[r.temperature for r in requests],
            top_k=[r.top_k for r in requests],
            top_p=[r.top_p for r in requests],
            uniform=[one.random.random() for one in draws],
        )


def inverse_draw(logits_nv: Tensor, **settings: Any) -> list[int]:
    """As `inverse_draws`, on the host."""
    return inverse_draws(logits_nv, **settings).tolist()


def inverse_draws(
    logits_nv: Tensor, *, temperature: list[float], top_k: list[int], top_p: list[float], uniform: list[float]
) -> Tensor:
    """The token where the filtered distribution's cumulative sum passes `uniform` (0 <= u < 1), row by row, [n].

    top_k keeps the k most likely; top_p then keeps the fewest whose sum reaches p of those; one always stays.
    """
    filtered = [i for i, (k, p) in enumerate(zip(top_k, top_p, strict=True)) if k > 0 or p < 1]
    free = sorted(set(range(len(uniform))) - set(filtered))
    scaled_nv = logits_nv / _column(temperature, logits_nv)
    if not filtered:
        return _draw_from_all(scaled_nv, uniform)
    drawn_n = torch.zeros(len(uniform), dtype=torch.long, device=logits_nv.device)
    if free:
        at = on_device(free, torch.long, logits_nv.device)
        drawn_n.index_copy_(0, at, _draw_from_all(scaled_nv[at], [uniform[i] for i in free]))
    at = on_device(filtered, torch.long, logits_nv.device)
    settings: list[list[Any]] = [[values[i] for i in filtered] for values in (top_k, top_p, uniform)]
    return drawn_n.index_copy_(0, at, _draw_from_likeliest(scaled_nv[at], *settings))


def _draw_from_all(logits_nv: Tensor, uniform: list[float]) -> Tensor:
    """In the vocabulary's order, which spares the sort: that takes ten times as long as all else."""
    cumulative = logits_nv.softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    threshold = _column(uniform, cumulative) * total
    below = torch.nextafter(total, torch.zeros_like(total))  # rounding may carry the threshold to the very end
    return torch.searchsorted(cumulative, threshold.minimum(below), right=True).squeeze(1)


def _draw_from_likeliest(logits_nv: Tensor, top_k: list[int], top_p: list[float], uniform: list[float]) -> Tensor:
    """In the order of likelihood."""
    v = logits_nv.shape[-1]
    sorted_nv, order_nv = torch.sort(logits_nv, dim=-1, descending=True, stable=True)
    keep_k = _column([k if k > 0 else v for k in top_k], logits_nv)
    rank = torch.arange(v, device=logits_nv.device)
    kept = torch.where(rank < keep_k, sorted_nv.softmax(-1), 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    before = kept.cumsum(-1) - kept
    kept = torch.where((before < _column(top_p, logits_nv)) | (rank == 0), kept, 0.0)
    cumulative = kept.cumsum(-1)
    threshold = _column(uniform, logits_nv) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, threshold, right=True)
    last = (kept > 0).sum(-1, keepdim=True) - 1  # rounding may carry the threshold past the end
    return order_nv.gather(1, place.minimum(last)).squeeze(1)


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return on_device(values, like.dtype, like.device).unsqueeze(1)


def on_device(values: Sequence[float] | Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The values as a tensor, by a copy that the host doesn't wait for."""
    tensor = torch.tensor(values, dtype=dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def score(logits_nv: Tensor, tokens_n: Tensor, top: int) -> tuple[list[float], list[Top]]:
    """Log probability of `tokens_n` and the `top` best alternatives, row by row."""
    logprobs = logits_nv.float().log_softmax(-1)
    own = logprobs.gather(1, tokens_n.long().unsqueeze(1)).squeeze(1).tolist()
    if not top:
        return own, [[] for _ in own]
    values, ids = logprobs.topk(top, dim=-1)
    pairs = zip(ids.tolist(), values.tolist(), strict=True)
    return own, [list(zip(row_ids, row_values, strict=True)) for row_ids, row_values in pairs]
