"""Turns one request's events into its answer: pieces of text, scored tokens, and the finish reason."""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from megatron_mixtral.serve.admission import Stream
from megatron_mixtral.serve.http.detokenizer import Detokenizer, StopStrings
from megatron_mixtral.serve.messages import Finish, PromptScores, Token, Top
from megatron_mixtral.tokenization.tokenizer import Tokenizer

LEAST = -9999.0  # what the OpenAI API writes for a log probability of minus infinity, which JSON can't hold


@dataclass(frozen=True, slots=True)
class Scored:
    """A token with its log probability (None where not asked for, and for a prompt's first) and alternatives."""

    token: int
    logprob: float | None = None
    top: Top = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """The result of one event: text (or none yet), its token, and whether it is the end."""

    text: str = ""
    tokens: list[Scored] = field(default_factory=list)
    prompt: list[Scored] = field(default_factory=list)
    finish: Finish | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """All pieces of one request."""

    text: str
    tokens: list[Scored]
    prompt: list[Scored]
    finish: Finish


async def pieces(
    stream: Stream, tokenizer: Tokenizer, *, context: list[int], stops: list[str]
) -> AsyncIterator[Piece]:
    """Follow `stream` to its end; an early exit by a stop string or an exception cancels the request.

    `context` are the ids before the text: none for a chat, and the prompt for a completion.
    """
    words, cut = Detokenizer(tokenizer, context), StopStrings(stops)
    prompt = stream.request.prompt
    scored = 1  # prompt tokens dealt with: the first has no log probability
    try:
        async for event in stream:
            if isinstance(event, PromptScores):
                part = prompt[scored : scored + len(event.logprobs)]
                scored += len(part)
                yield Piece(prompt=[Scored(*s) for s in zip(part, event.logprobs, event.tops, strict=True)])
                continue
            assert isinstance(event, Token)
            piece = _piece(event, words, cut)
            yield piece
            if piece.finish:
                return
    finally:
        stream.close()


def _piece(event: Token, words: Detokenizer, cut: StopStrings) -> Piece:
    tokens = [] if event.token is None else [Scored(event.token, event.logprob, event.top or [])]
    text = "" if event.token is None else words.push(event.token)
    shown = cut.push(text + words.flush() if event.finish else text)
    if cut.hit is not None:
        return Piece(shown, tokens, finish="stop")
    return Piece(shown + cut.flush() if event.finish else shown, tokens, finish=event.finish)


async def whole(stream: Stream, tokenizer: Tokenizer, *, context: list[int], stops: list[str]) -> Answer:
    """The joined pieces."""
    parts = [piece async for piece in pieces(stream, tokenizer, context=context, stops=stops)]
    finish = parts[-1].finish
    assert finish is not None
    return Answer(
        "".join(p.text for p in parts),
        [t for p in parts for t in p.tokens],
        [t for p in parts for t in p.prompt],
        finish,
    )


def finite(logprob: float | None) -> float | None:
    """A number that JSON can hold."""
    return None if logprob is None else max(logprob, LEAST)
