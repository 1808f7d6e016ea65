"""From a validated body to requests for the engine: prompts as token ids, room in the context, a seed a choice."""

import asyncio
import secrets
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.serve.admission import Service
from megatron_mixtral.serve.http.bounds import Bounds
from megatron_mixtral.serve.http.errors import Problem
from megatron_mixtral.serve.http.schema import MOST_ANSWERS, ChatBody, CompletionBody, Sampled
from megatron_mixtral.serve.messages import Request
from megatron_mixtral.tokenization.chat import Form
from megatron_mixtral.tokenization.tokenizer import Tokenizer

LONG = 20_000  # characters that take long enough to tokenize for others to notice


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What the HTTP side knows of the served model."""

    name: str
    tokenizer: Tokenizer
    form: Form
    vocab_size: int
    created: int
    bounds: Bounds

    async def encode(self, text: str) -> list[int]:
        """Ids of `text` without control tokens; long ones are done aside."""
        _refuse_surrogates(text)
        if len(text) > self.bounds.text:
            raise _too_much(f"{len(text)} characters", self, "prompt")
        if len(text) < LONG:
            return self.tokenizer.encode(text)
        return await asyncio.to_thread(self.tokenizer.encode, text)

    def check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            raise Problem(
                404, f"the model {name!r} doesn't exist; served: {self.name}", param="model", code="model_not_found"
            )


async def completion_prompts(body: CompletionBody, model: ServedModel) -> list[list[int]]:
    """Ids of each prompt: a text's behind the begin token, as transformers encodes it; given ids as they are."""
    given: Any = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) else body.prompt
    prompts = []
    for prompt in given:
        if isinstance(prompt, str):
            prompts.append([model.tokenizer.bos, *await model.encode(prompt)])
        elif (largest := max(prompt)) >= model.vocab_size:
            raise Problem(
                400, f"token id {largest} isn't in the vocabulary of {model.vocab_size} tokens", param="prompt"
            )
        else:
            prompts.append(list(prompt))
    return prompts


async def chat_prompt(body: ChatBody, model: ServedModel) -> list[int]:
    """The conversation as the model writes it, up to where the assistant speaks."""
    if len(body.messages) > model.bounds.context:
        raise _too_much(f"{len(body.messages)} messages", model, "messages")
    messages = [{"role": "system" if m.role == "developer" else m.role, "content": m.text} for m in body.messages]
    for message in messages:
        _refuse_surrogates(message["content"])
    if messages[-1]["role"] != "user":
        raise Problem(400, "the last message must be the user's", param="messages")
    try:
        if sum(len(message["content"]) for message in messages) < LONG:
            return model.form.prompt(messages)
        return await asyncio.to_thread(model.form.prompt, messages)
    except ValueError as error:
        raise Problem(400, str(error), param="messages") from error


def requests(
    body: Sampled,
    prompts: list[list[int]],
    *,
    model: ServedModel,
    service: Service,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: bool = False,
) -> list[Request]:
    """n requests a prompt, prompt by prompt. `max_tokens` None: to the end of the context."""
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    if len(prompts) * (body.n or 1) > MOST_ANSWERS:
        asked = f"{len(prompts)} prompts x {body.n} choices"
        raise Problem(400, f"{asked} are more than the {MOST_ANSWERS} answers of one call", param="n")
    made = []
    for prompt in prompts:
        room = service.limits.context - len(prompt)
        wanted = room if max_tokens is None else max_tokens
        if wanted > room or room < 1:
            raise too_long(len(prompt), max_tokens, service.limits.context)
        for choice in range(body.n or 1):
            made.append(
                Request(
                    id=service.new_id(),
                    prompt=prompt,
                    max_tokens=wanted,
                    seed=seed + choice,
                    temperature=_or(body.temperature, 1.0),
                    top_k=max(body.top_k or 0, 0),
                    top_p=_or(body.top_p, 1.0),
                    presence_penalty=body.presence_penalty or 0.0,
                    frequency_penalty=body.frequency_penalty or 0.0,
                    logit_bias=_bias(body, model),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                    stop_tokens=() if body.ignore_eos else model.tokenizer.ends,
                    json=isinstance(body, ChatBody) and body.as_json,
                )
            )
    return made


def _too_much(what: str, model: ServedModel, param: str) -> Problem:
    """What needn't be tokenized to see that it doesn't fit."""
    why = f"{what} are more than this model's context of {model.bounds.context} tokens can hold"
    return Problem(400, why, param=param, code="context_length_exceeded")


def too_long(prompt: int, answer: int | None, context: int) -> Problem:
    asked = f"{prompt} in the prompt" + ("" if answer is None else f" and {answer} in the answer")
    return Problem(
        400,
        f"this model's context is {context} tokens; {asked} were asked for",
        param="messages" if answer is None else "max_tokens",
        code="context_length_exceeded",
    )


def _bias(body: Sampled, model: ServedModel) -> dict[int, float]:
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    if bias and (largest := max(bias)) >= model.vocab_size:
        raise Problem(400, f"token id {largest} isn't in the vocabulary", param="logit_bias")
    return bias


def _or(value: float | None, default: float) -> float:
    """OpenAI reads null as the default, and 0 as 0."""
    return default if value is None else value


def _refuse_surrogates(text: str) -> None:
    """Half a character can be written in JSON but is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Problem(400, "the text holds a lone surrogate, which isn't a character") from error
