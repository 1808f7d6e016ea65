"""Admission between HTTP handlers and the engine: admits requests, delivers tokens, and cancels requests of clients
that left.

It runs on the event loop's thread. Orders go out through `send`, and events come in through `deliver`.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_mixtral.serve.messages import Cancel, Event, Order, Request, Token
from megatron_mixtral.serve.metrics import Metrics


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much may be running and waiting at once."""

    context: int  # tokens of one prompt and its answer
    running: int  # requests that the engine works on at once
    queued: int  # requests that may wait beyond those
    tokens: int  # tokens of all of those together, prompts and answers


class Refused(Exception):
    """The queue is full: try again in `retry_after` seconds."""

    retry_after = 1


class Unavailable(Exception):
    """The server is shutting down, or a rank of its engine is gone."""


State = Literal["ready", "draining", "failed"]


class Stream:
    """The events of one request, in order; close it when nobody needs them any more."""

    def __init__(self, service: "Service", request: Request) -> None:
        self.request = request
        self._service = service
        self._events: asyncio.Queue[Event | Unavailable] = asyncio.Queue()
        self._last = time.monotonic()
        self._first = True

    def push(self, event: Event | Unavailable) -> None:
        self._events.put_nowait(event)
        if isinstance(event, Token) and event.token is not None:
            now = time.monotonic()
            self._service.metrics.token(now - self._last, first=self._first)
            self._last, self._first = now, False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Event:
        event = await self._events.get()
        if isinstance(event, Unavailable):
            raise event
        return event

    def close(self) -> None:
        """Can be called at any time and repeatedly; an unfinished request is cancelled."""
        self._service.forget(self.request.id)


class Service:
    """Admits requests within the limits and carries each one's events to its stream."""

    def __init__(self, limits: Limits, send: Callable[[Order], None], metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self.state: State = "ready"
        self.reason = ""
        self._send = send
        self._streams: dict[int, Stream] = {}
        self._tokens = 0  # tokens of the admitted requests at most
        self._next = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        return len(self._streams)

    def new_id(self) -> int:
        self._next += 1
        return self._next

    def open(self, requests: Sequence[Request]) -> list[Stream]:
        """Admit all requests or none; a call that is larger than the queue is admitted when the queue is empty."""
        if self.state != "ready":
            raise Unavailable(self.reason)
        tokens = sum(_size(r) for r in requests)
        full = self.in_flight + len(requests) > self.limits.running + self.limits.queued
        if self._streams and (full or self._tokens + tokens > self.limits.tokens):
            self.metrics.refused()
            raise Refused
        streams = [Stream(self, request) for request in requests]
        for stream in streams:
            self._streams[stream.request.id] = stream
            self._tokens += _size(stream.request)
            self.metrics.prompt(len(stream.request.prompt))
            self._send(stream.request)
        self._idle.clear()
        self._gauge()
        return streams

    def deliver(self, events: Sequence[Event]) -> None:
        """Deliver the events of one engine step; events of cancelled requests are dropped."""
        for event in events:
            stream = self._streams.get(event.request)
            if stream is None:
                continue
            stream.push(event)
            if event.finish:
                self._remove(event.request)

    def forget(self, request: int) -> None:
        """Cancel `request` unless it is over."""
        if request in self._streams:
            self._remove(request)
            self._send(Cancel(request))

    def begin_drain(self) -> None:
        """Admit nothing new; running requests continue."""
        if self.state == "ready":
            self.state, self.reason = "draining", "the server is shutting down"

    async def drained(self) -> None:
        await self._idle.wait()

    def fail(self, reason: str) -> None:
        """Tell every waiting client that its answer won't come."""
        self.state, self.reason = "failed", reason
        for request, stream in list(self._streams.items()):
            stream.push(Unavailable(reason))
            self._remove(request)

    def _remove(self, request: int) -> None:
        self._tokens -= _size(self._streams.pop(request).request)
        self._gauge()
        if not self._streams:
            self._idle.set()

    def _gauge(self) -> None:
        running = min(self.in_flight, self.limits.running)
        self.metrics.load(running=running, queued=self.in_flight - running)


def _size(request: Request) -> int:
    return len(request.prompt) + request.max_tokens
