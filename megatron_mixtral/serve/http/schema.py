"""The bodies that `/v1` accepts: OpenAI's names and ranges, plus `top_k` and `ignore_eos`.

Unsupported fields are refused by name, not ignored. Fields without influence on the answer are accepted, and so is
null, which clients send for an unset field.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MOST_CHOICES = 128
MOST_PROMPTS = 128
MOST_ANSWERS = 512  # of one call: prompts x n
MOST_ALTERNATIVES = 20
MOST_BIASES = 1024
MOST_NOTES = 64  # of `metadata`


def at_most(most: int) -> Callable[[Any], Any]:
    """A check of an object's size before its entries are looked at: pydantic's own comes after them."""

    def check(raw: Any) -> Any:
        if isinstance(raw, dict) and len(raw) > most:
            raise ValueError(f"{len(raw)} entries; at most {most}")
        return raw

    return check


# A list's first mistake is enough to refuse it, hence fail_fast: a list of mistakes would take long to tell.
Count = Annotated[int, Field(ge=0)]
Some = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
TokenKey = Annotated[str, Field(pattern=r"^\d{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16, fail_fast=True)]


class Strict(BaseModel):
    """An object of known fields and exact types; of several unknown fields, one is told."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_at_most(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or len(raw) <= len(cls.model_fields):
            return raw
        unknown = next(name for name in raw if name not in cls.model_fields)
        return {name: value for name, value in raw.items() if name in cls.model_fields or name == unknown}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(Strict):
    """Fields that both kinds of completions share."""

    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=100)] | None = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str, Field(min_length=1)] | Stop | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias] | None, BeforeValidator(at_most(MOST_BIASES))] = None
    ignore_eos: bool | None = False
    user: str | None = None  # from here on: no influence on the answer
    metadata: Annotated[dict[str, Any] | None, BeforeValidator(at_most(MOST_NOTES))] = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _usage_needs_a_stream(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(Sampled):
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )
    max_tokens: Count | None = 16
    echo: bool | None = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    best_of: Some | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _consistent(self) -> "CompletionBody":
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n isn't supported")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 answers nothing without echo")
        return self


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """A message; an assistant's message may have all fields of the server's answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]
    name: str | None = None
    annotations: list[Any] | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "\n\n".join(part.text for part in self.content)


class ResponseFormat(Strict):
    type: Literal["text", "json_object"]


class ChatBody(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: Some | None = None
    max_completion_tokens: Some | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)] | None = None
    response_format: ResponseFormat | None = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    audio: None = None  # from here on: not supported
    function_call: None = None
    functions: None = None
    parallel_tool_calls: None = None
    prediction: None = None
    reasoning_effort: None = None
    tool_choice: None = None
    tools: None = None
    verbosity: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.as_json and self.ignore_eos:
            raise ValueError(
                "response_format json_object ends at the object's end, so it can't be combined with ignore_eos"
            )
        return self

    @property
    def as_json(self) -> bool:
        return self.response_format is not None and self.response_format.type == "json_object"
