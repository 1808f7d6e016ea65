"""`PUT /api`, the shape of Megatron's `text_generation_cli.py`: prompts in; text, segments and logprobs out.

Its words and ranges, but every setting is honoured, and an error is an error: 400 with its message.
"""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import Field, model_validator
from starlette.requests import Request as HttpRequest

from megatron_mixtral.serve.admission import Service
from megatron_mixtral.serve.http import errors, requests
from megatron_mixtral.serve.http.detokenizer import Detokenizer
from megatron_mixtral.serve.http.disconnect import all_or_gone
from megatron_mixtral.serve.http.errors import Problem
from megatron_mixtral.serve.http.requests import ServedModel
from megatron_mixtral.serve.http.responses import Answer, Scored, finite, whole
from megatron_mixtral.serve.http.schema import MOST_PROMPTS, Stop, Strict
from megatron_mixtral.serve.messages import Request
from megatron_mixtral.tokenization.token_text import token_text

RENAMED = {
    "max_len": "max_len is no longer used. Replace with tokens_to_generate",
    "sentences": "sentences is no longer used. Replace with prompts",
    "beam_width": "beam search isn't supported",
    "prevent_newline_after_colon": "prevent_newline_after_colon isn't supported",
    "top_p_decay": "top_p_decay isn't supported",
    "top_p_bound": "top_p_bound isn't supported",
}


class GenerateBody(Strict):
    """Defaults are upstream's; `add_BOS` left out means yes, as its Mixtral tokenizer has it."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    tokens_to_generate: Annotated[int, Field(ge=0)] = 64
    logprobs: bool = False
    top_n_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    add_BOS: bool = True
    stop_on_eol: bool = False
    stop_on_double_eol: bool = False
    stop_token: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    stop_words: Stop = Field(default_factory=list)
    random_seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    no_log: bool = False
    length_penalty: float = 1.0  # of beam search; upstream's client may send it

    @model_validator(mode="before")
    @classmethod
    def _say_what_replaced_it(cls, raw: Any) -> Any:
        for name, message in RENAMED.items():
            if isinstance(raw, dict) and raw.get(name):
                raise ValueError(message)
        known = isinstance(raw, dict)
        return {k: v for k, v in raw.items() if k not in RENAMED} if known else raw

    @model_validator(mode="after")
    def _consistent(self) -> "GenerateBody":
        if self.top_k > 0 and self.top_p > 0:
            raise ValueError("cannot set both top_k and top_p samplings")
        if self.tokens_to_generate == 0 and not self.logprobs:
            raise ValueError("tokens_to_generate=0 implies logprobs should be true")
        if not self.add_BOS and not all(self.prompts):
            raise ValueError("empty prompts require add_BOS=true")
        if self.top_n_logprobs and not self.logprobs:
            raise ValueError("top_n_logprobs needs logprobs to be true")
        return self

    @property
    def stops(self) -> list[str]:
        return [*self.stop_words, *["\n"] * self.stop_on_eol, *["\n\n"] * self.stop_on_double_eol]


def router(model: ServedModel, service: Service) -> APIRouter:
    routes = APIRouter(responses=errors.documented(errors.MegatronRefusal))

    @routes.api_route("/api", methods=["PUT", "POST"])
    async def generate(body: GenerateBody, http: HttpRequest) -> Response:
        made = await _requests(body, model, service)
        streams = service.open(made)
        reading = [whole(s, model.tokenizer, context=s.request.prompt, stops=body.stops) for s in streams]
        answers = await all_or_gone(http, streams, reading)
        return JSONResponse(_body(body, model, made, answers))

    return routes


async def _requests(body: GenerateBody, model: ServedModel, service: Service) -> list[Request]:
    seed = body.random_seed if body.random_seed is not None else secrets.randbits(63)
    made = []
    for index, text in enumerate(body.prompts):
        begin = [model.tokenizer.bos] if body.add_BOS else []
        prompt = [*begin, *await model.encode(text)]
        if len(prompt) + max(body.tokens_to_generate, 1) > service.limits.context:
            raise requests.too_long(len(prompt), body.tokens_to_generate, service.limits.context)
        made.append(
            Request(
                id=service.new_id(),
                prompt=prompt,
                max_tokens=body.tokens_to_generate,
                seed=seed + index,
                temperature=body.temperature,
                top_k=body.top_k,
                top_p=body.top_p or 1.0,
                logprobs=body.top_n_logprobs if body.logprobs else None,
                prompt_logprobs=body.logprobs,
                stop_tokens=model.tokenizer.ends if body.stop_token is None else (body.stop_token,),
            )
        )
    if not all(r.prompt for r in made):
        raise Problem(400, "a prompt without any token needs add_BOS=true")
    return made


def _body(body: GenerateBody, model: ServedModel, made: list[Request], answers: list[Answer]) -> dict[str, Any]:
    """Texts begin with their prompts; segments are the text of each token, begin token and all."""
    text, segments, tokens = [], [], []
    for prompt, request, answer in zip(body.prompts, made, answers, strict=True):
        ids = [*request.prompt, *(t.token for t in answer.tokens)]
        text.append(prompt + answer.text)
        tokens.append(ids)
        segments.append(_segments(model, ids))
    reply: dict[str, Any] = {"text": text, "segments": segments, "tokens": tokens}
    if body.logprobs:
        scored = [[*a.prompt, *a.tokens] for a in answers]
        reply["logprobs"] = [[finite(t.logprob) for t in row] for row in scored]
        if body.top_n_logprobs:
            reply["top_n_logprobs"] = [[_named(model, t) for t in row] for row in scored]
    return reply


def _segments(model: ServedModel, ids: list[int]) -> list[str]:
    words = Detokenizer(model.tokenizer, [])
    parts = [words.push(token) for token in ids]
    parts[-1] += words.flush()
    return parts


def _named(model: ServedModel, scored: Scored) -> dict[str, float | None]:
    return {token_text(model.tokenizer, token): finite(value) for token, value in scored.top}
