"""What passes between the HTTP side and the engine's ranks: requests one way, tokens the other.

Everything here turns into plain JSON values and back, so that no rank ever unpickles what came over a socket.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

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
    stop_tokens: tuple[int, ...] = ()  # any of them ends the text, and is part of the answer's ids
    json: bool = False  # the text is a JSON object

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Request":
        bias = {int(token): float(value) for token, value in raw["logit_bias"].items()}
        return cls(**{**raw, "logit_bias": bias, "stop_tokens": tuple(raw["stop_tokens"])})


@dataclass(frozen=True, slots=True)
class Cancel:
    """The order to forget a request."""

    request: int


@dataclass(frozen=True, slots=True)
class Stop:
    """The order to end all ranks' loops."""


Order = Request | Cancel | Stop


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

    @classmethod
    def from_json(cls, request: int, token: int | None, logprob: float | None, top: Any, finish: Any) -> "Token":
        return cls(request, token, logprob, None if top is None else _pairs(top), finish)


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Log probabilities of prompt tokens 1, 2, ... (the first has none); a long prompt's come in several parts."""

    request: int
    logprobs: list[float]
    tops: list[Top]
    finish: ClassVar[None] = None

    def to_json(self) -> list[Any]:
        return ["p", self.request, self.logprobs, self.tops]

    @classmethod
    def from_json(cls, request: int, logprobs: list[float], tops: list[list[list[Any]]]) -> "PromptScores":
        return cls(request, logprobs, [_pairs(top) for top in tops])


Event = Token | PromptScores
EVENTS: dict[str, type[Event]] = {"t": Token, "p": PromptScores}


def event_from_json(raw: list[Any]) -> Event:
    """The inverse of `to_json`; pairs come back as tuples."""
    kind, *values = raw
    return EVENTS[kind].from_json(*values)


def _pairs(top: list[list[Any]]) -> Top:
    return [(int(token), float(value)) for token, value in top]


@dataclass(slots=True)
class Instruction:
    """What every rank of one replica is to do next: take requests on, let others go, and step."""

    add: list[Request] = field(default_factory=list)
    cancel: list[int] = field(default_factory=list)
    step: bool = False  # False: take part idly in a step of the others

    def to_json(self) -> dict[str, Any]:
        return {"add": [request.to_json() for request in self.add], "cancel": self.cancel, "step": self.step}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Instruction":
        return cls([Request.from_json(request) for request in raw["add"]], raw["cancel"], raw["step"])


@dataclass(frozen=True, slots=True)
class StepReport:
    """What that brought, as the replica's speaker tells it."""

    events: list[Event]
    busy: bool
    cache: float  # share of its cache in use

    def to_json(self) -> dict[str, Any]:
        return {"events": [event.to_json() for event in self.events], "busy": self.busy, "cache": self.cache}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "StepReport":
        return cls([event_from_json(event) for event in raw["events"]], raw["busy"], raw["cache"])
