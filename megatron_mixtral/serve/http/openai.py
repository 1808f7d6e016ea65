"""`/v1`: models, completions and chat completions for the `openai` client, streamed or whole."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.requests import Request as HttpRequest
from starlette.types import Receive, Scope, Send

from megatron_mixtral.serve.admission import Service, Stream
from megatron_mixtral.serve.http import errors, requests
from megatron_mixtral.serve.http.detokenizer import Detokenizer, readable
from megatron_mixtral.serve.http.disconnect import all_or_gone
from megatron_mixtral.serve.http.requests import ServedModel
from megatron_mixtral.serve.http.responses import Answer, Piece, Scored, finite, pieces, whole
from megatron_mixtral.serve.http.schema import ChatBody, CompletionBody, Sampled
from megatron_mixtral.tokenization.token_text import token_bytes, token_text
from megatron_mixtral.tokenization.tokenizer import Tokenizer

WHOLE_OR_STREAMED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The whole answer, or with `stream` its pieces as server-sent events",
        "content": {"application/json": {}, "text/event-stream": {}},
    }
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """One HTTP request: its streams, and how their tokens become text."""

    kind: str  # the object's name
    id: str
    model: ServedModel
    body: Sampled
    streams: list[Stream]
    contexts: list[list[int]]  # the ids before each choice's text
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def head(self) -> dict[str, Any]:
        return {"id": self.id, "created": self.created, "model": self.model.name}

    def usage(self, generated: int) -> dict[str, int]:
        """A prompt counts once however many choices it has."""
        prompt = sum(len(s.request.prompt) for s in self.streams[:: self.body.n or 1])
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def router(model: ServedModel, service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", responses=errors.documented(errors.OpenAIRefusal))
    card = {"id": model.name, "object": "model", "created": model.created, "owned_by": "mixlaunch"}
    card["max_model_len"] = service.limits.context

    @routes.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card]}

    @routes.get("/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        model.check_name(name)
        return card

    @routes.post("/completions", responses=WHOLE_OR_STREAMED)
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        model.check_name(body.model)
        call = await _completion(body, model, service)
        if body.stream:
            return _EventStream(call, [_CompletionShape(call, i) for i in range(len(call.streams))])
        return _whole_completion(call, await _answers(call, http))

    @routes.post("/chat/completions", responses=WHOLE_OR_STREAMED)
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        model.check_name(body.model)
        call = await _chat(body, model, service)
        if body.stream:
            return _EventStream(call, [_ChatShape(call, i) for i in range(len(call.streams))])
        return _whole_chat(call, await _answers(call, http))

    return routes


async def _completion(body: CompletionBody, model: ServedModel, service: Service) -> Call:
    """Request the choices of every prompt."""
    made = requests.requests(
        body,
        await requests.completion_prompts(body, model),
        model=model,
        service=service,
        max_tokens=16 if body.max_tokens is None else body.max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )
    return Call(
        kind="text_completion",
        id=f"cmpl-{uuid.uuid4().hex}",
        model=model,
        body=body,
        streams=service.open(made),
        contexts=[r.prompt for r in made],
    )


async def _chat(body: ChatBody, model: ServedModel, service: Service) -> Call:
    """Request the choices of a conversation."""
    made = requests.requests(
        body,
        [await requests.chat_prompt(body, model)],
        model=model,
        service=service,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return Call(
        kind="chat.completion",
        id=f"chatcmpl-{uuid.uuid4().hex}",
        model=model,
        body=body,
        streams=service.open(made),
        contexts=[[] for _ in made],
    )


async def _answers(call: Call, http: HttpRequest) -> list[Answer]:
    """All choices, whole."""
    tokenizer, stops = call.model.tokenizer, call.body.stops
    reading = zip(call.streams, call.contexts, strict=True)
    return await all_or_gone(http, call.streams, [whole(s, tokenizer, context=c, stops=stops) for s, c in reading])


def _whole_completion(call: Call, answers: list[Answer]) -> JSONResponse:
    choices = []
    for index, answer in enumerate(answers):
        shape = _CompletionShape(call, index)
        piece = Piece(answer.text, answer.tokens, answer.prompt, answer.finish)
        choices.append(shape.choice(piece))
    generated = sum(len(a.tokens) for a in answers)
    body = {**call.head, "object": call.kind, "choices": choices, "usage": call.usage(generated)}
    return JSONResponse(body)


def _whole_chat(call: Call, answers: list[Answer]) -> JSONResponse:
    choices = []
    for index, answer in enumerate(answers):
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = _chat_logprobs(call, answer.tokens)
        choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.finish})
    generated = sum(len(a.tokens) for a in answers)
    body = {**call.head, "object": call.kind, "choices": choices, "usage": call.usage(generated)}
    return JSONResponse(body)


class _CompletionShape:
    """A completion's chunks; counts the text before each for `text_offset`."""

    object = "text_completion"

    def __init__(self, call: Call, index: int) -> None:
        self._call, self._index = call, index
        self._request = call.streams[index].request
        tokenizer, prompt = call.model.tokenizer, self._request.prompt
        echo = getattr(call.body, "echo", False)
        self._echo = tokenizer.decode(readable(tokenizer, prompt)) if echo else ""
        self._unscored = prompt[:1] if echo else []  # the first token follows nothing
        self._words = Detokenizer(tokenizer, [] if echo else prompt)
        self._offset = 0

    def opening(self) -> dict[str, Any] | None:
        return None

    def choice(self, piece: Piece) -> dict[str, Any] | None:
        """None for a piece without visible content."""
        scored = [*(Scored(token) for token in self._unscored), *piece.prompt, *piece.tokens]
        logprobs = None if self._request.logprobs is None else self._logprobs(scored)
        text, self._echo, self._unscored = self._echo + piece.text, "", []
        if not (text or piece.finish or (logprobs and logprobs["tokens"])):
            return None
        return {"index": self._index, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any]:
        tokenizer = self._call.model.tokenizer
        offsets = []
        for s in scored:
            offsets.append(self._offset)
            self._offset += len(self._words.push(s.token))
        return {
            "tokens": [token_text(tokenizer, s.token) for s in scored],
            "token_logprobs": [finite(s.logprob) for s in scored],
            "top_logprobs": [_alternatives(tokenizer, s) for s in scored] if self._request.logprobs else None,
            "text_offset": offsets,
        }


class _ChatShape:
    """A chat answer's chunks: first the role, then the text."""

    object = "chat.completion.chunk"

    def __init__(self, call: Call, index: int) -> None:
        self._call, self._index = call, index

    def opening(self) -> dict[str, Any] | None:
        return self._delta({"role": "assistant", "content": ""}, None, None)

    def choice(self, piece: Piece) -> dict[str, Any] | None:
        logprobs = _chat_logprobs(self._call, piece.tokens)
        if not (piece.text or piece.finish or logprobs):
            return None
        return self._delta({"content": piece.text} if piece.text or logprobs else {}, logprobs, piece.finish)

    def _delta(self, delta: dict[str, Any], logprobs: Any, finish: str | None) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _alternatives(tokenizer: Tokenizer, scored: Scored) -> dict[str, float | None] | None:
    """The best tokens by their text, always including the token itself; empty for a token without a log
    probability.
    """
    if scored.logprob is None:
        return None
    found = {token_text(tokenizer, token): finite(value) for token, value in scored.top}
    found.setdefault(token_text(tokenizer, scored.token), finite(scored.logprob))
    return found


def _chat_logprobs(call: Call, tokens: list[Scored]) -> dict[str, Any] | None:
    if call.streams[0].request.logprobs is None or not tokens:
        return None
    tokenizer = call.model.tokenizer

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        data = token_bytes(tokenizer, token)
        return {"token": token_text(tokenizer, token), "logprob": finite(logprob), "bytes": data}

    content = [
        {**entry(s.token, s.logprob), "top_logprobs": [entry(token, value) for token, value in s.top]}
        for s in tokens
    ]
    return {"content": content, "refusal": None}


class _EventStream(StreamingResponse):
    """Sends chunks as they come. The requests are closed however it ends, even before it began."""

    def __init__(self, call: Call, shapes: list[Any]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_chunks(call, shapes), media_type="text/event-stream", headers=headers)
        self._streams = call.streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            for stream in self._streams:
                stream.close()


async def _chunks(call: Call, shapes: list[Any]) -> AsyncIterator[str]:
    """Server-sent events of all choices as they come, then usage when asked for, then [DONE]."""
    usage_wanted = call.body.stream_options is not None and call.body.stream_options.include_usage
    head = {**call.head, "object": shapes[0].object}
    if usage_wanted:
        head["usage"] = None
    generated = 0
    try:
        for shape in shapes:
            if (opening := shape.opening()) is not None:
                yield _sse({**head, "choices": [opening]})
        async for index, piece in _merged(call):
            generated += len(piece.tokens)
            if (choice := shapes[index].choice(piece)) is not None:
                yield _sse({**head, "choices": [choice]})
        if usage_wanted:
            yield _sse({**head, "choices": [], "usage": call.usage(generated)})
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _sse({"error": errors.from_exception(error).error})


async def _merged(call: Call) -> AsyncIterator[tuple[int, Piece]]:
    """Pieces of all choices, each with its index, in the order in which they come."""
    ready: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

    async def pump(index: int, stream: Stream) -> None:
        try:
            context = call.contexts[index]
            async for piece in pieces(stream, call.model.tokenizer, context=context, stops=call.body.stops):
                ready.put_nowait((index, piece))
        except Exception as error:
            ready.put_nowait(error)

    pumps = [asyncio.create_task(pump(i, s)) for i, s in enumerate(call.streams)]
    try:
        open_choices = len(pumps)
        while open_choices:
            item = await ready.get()
            if isinstance(item, BaseException):
                raise item
            open_choices -= item[1].finish is not None
            yield item
    finally:
        for task in pumps:
            task.cancel()


def _sse(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
