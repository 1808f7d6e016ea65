"""uvicorn in its own thread beside the engine: it starts when the port is bound, and a drain ends it."""

import asyncio
import errno
import queue
import resource
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.serve.admission import Service
from megatron_mixtral.serve.messages import Event, Stop

MOST_FILES = 65536
SEND_BUFFER = 64 * 1024  # without a limit the kernel buffers megabytes for each client that doesn't read
LAST_WORDS_SECONDS = 0.3  # time to send errors to cancelled clients


def allow_many_connections() -> None:
    """Raise the limit of open files: each client needs one, and shells allow about a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class PortTaken(InputError):
    """Another program uses the port."""


def bind(host: str, port: int, *, others: int = 0) -> socket.socket:
    """The listening socket at `port`, or at the first free one of `others` behind it; port 0 takes any free one.

    `InputError` if they are in use, or not allowed.
    """
    for candidate in range(port, min(port + others, 65535)):
        with suppress(PortTaken):
            return _listen(host, candidate)
    return _listen(host, min(port + others, 65535))


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except OSError as error:
        raise InputError(f"{host}: {error.strerror}") from error
    # asyncio turns Nagle's algorithm off only if the protocol is named. Nagle delays the second packet of every
    # answer by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        kind = PortTaken if error.errno == errno.EADDRINUSE else InputError
        raise kind(f"{host} port {port}: {error.strerror}; port 0 takes a free one") from error
    return listener


class HttpThread:
    """The HTTP side of rank 0. Methods may be called from any thread."""

    def __init__(
        self, listener: socket.socket, service: Service, app: ASGIApp, *, inbox: "queue.SimpleQueue[Any]"
    ) -> None:
        self._listener, self._service, self._inbox = listener, service, inbox
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._draining = False

    def start(self) -> None:
        """Start, and return when requests are answered."""
        started = threading.Event()
        self._started = started
        self._thread.start()
        if not started.wait(30) or not self._thread.is_alive():
            raise JobError("the HTTP server didn't start")

    def deliver(self, events: list[Event], cache_used: float) -> None:
        """Called on the engine's thread: passes all events of a step to the loop in one call."""
        self._call(self._deliver, events, cache_used)

    def fail(self, reason: str) -> None:
        """Send every client an error, and let `/health` report it."""
        self._call(self._service.fail, reason)

    def drain(self, seconds: float) -> None:
        """Accept nothing new, let running requests end within `seconds`, then stop the server and the engine."""
        self._call(self._begin_drain, seconds)

    def join(self) -> None:
        self._thread.join(10)

    def _call(self, function: Callable[..., object], *args: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed, so there is nobody to notify
            self._loop.call_soon_threadsafe(function, *args)

    def _deliver(self, events: list[Event], cache_used: float) -> None:
        self._service.metrics.kv_cache(cache_used)
        self._service.deliver(events)

    def _begin_drain(self, seconds: float) -> None:
        if not self._draining:
            self._draining = True
            self._task = self._loop.create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        self._service.begin_drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._service.drained(), seconds)
        if self._service.in_flight:
            self._service.fail("the server is shutting down")
            await asyncio.sleep(LAST_WORDS_SECONDS)
        self._server.should_exit = True

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.create_task(self._announce())
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        finally:
            self._loop.close()
            self._inbox.put(Stop())

    async def _announce(self) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        self._started.set()
