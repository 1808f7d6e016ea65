"""What passes between the HTTP side and the engine's ranks: requests one way, tokens the other.

Everything here turns into plain JSON values and back, so that no rank ever unpickles what came over a socket.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Finish = Literal["stop", "length"]
Top = list[tuple[int, float]]  # (token id, log probability), best first


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One continuation to generate; everything that decides its tokens, so that every rank draws the same ones."""

    id: int
    prompt: list[int]
    max_tokens: int  # 0 scores the prompt alone
    seed: int
    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    logprobs: int | None = None  # how many alternatives beside each token's own; None gives neither
    prompt_logprobs: bool = False
    stop_token: int = -1  # ends the text, is part of the answer's ids; -1 for none
    json: bool = False  # the text is a JSON object

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Request":
        bias = {int(token): float(value) for token, value in raw["logit_bias"].items()}
        return cls(**{**raw, "logit_bias": bias})


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token of a request; the last one carries why it ended."""

    request: int
    token: int | None  # None: nothing but scores was asked for
    logprob: float | None = None
    top: Top | None = None
    finish: Finish | None = None

    def to_json(self) -> list[Any]:
        return ["t", self.request, self.token, self.logprob, self.top, self.finish]


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log probabilities of prompt tokens 1, 2, ... (the first has none); a long prompt's come in several parts."""

    request: int
    logprobs: list[float]
    tops: list[Top]

    def to_json(self) -> list[Any]:
        return ["p", self.request, self.logprobs, self.tops]


Event = Token | PromptScores


def event_from_json(raw: list[Any]) -> Event:
    """The inverse of `to_json`; pairs come back as tuples."""
    kind, *values = raw
    if kind == "t":
        request, token, logprob, top, finish = values
        return Token(request, token, logprob, None if top is None else _pairs(top), finish)
    request, logprobs, tops = values
    return PromptScores(request, logprobs, [_pairs(top) for top in tops])


def _pairs(top: list[list[Any]]) -> Top:
    return [(int(token), float(value)) for token, value in top]
