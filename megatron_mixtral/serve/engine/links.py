"""Sockets between rank 0 and every other rank: orders down, events up, and a notice within seconds when a rank
dies.

They carry lines of JSON over TCP. A collective would hang when a peer dies or nothing happens for hours; a socket
waits without a timeout, and reads an end of file when the peer dies.
"""

import json
import os
import queue
import secrets
import socket
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import torch.distributed as dist

from megatron_mixtral.errors import JobError

MEETING_SECONDS = 60.0


class LinkLost(JobError):
    """The other end is gone."""


class RankLink:
    """One connection, read by its own thread, so callbacks run even while this rank computes."""

    def __init__(
        self, connection: socket.socket, on_lost: Callable[[], None], on_terminate: Callable[[], None]
    ) -> None:
        _notice_death(connection)
        self._connection = connection
        self._on_lost, self._on_terminate = on_lost, on_terminate
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ending = False
        threading.Thread(target=self._read, daemon=True, name="link").start()

    def send(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message, separators=(",", ":")).encode() + b"\n")
        except OSError as error:
            raise LinkLost(f"a rank can't be reached: {error}") from error

    def receive(self) -> dict[str, Any]:
        """Wait for the next message; `LinkLost` if the connection ends."""
        message = self._messages.get()
        if message is None:
            raise LinkLost("a rank closed its connection")
        return message

    def expect_end(self) -> None:
        """From now on the other end may close without a callback."""
        self._ending = True

    def close(self) -> None:
        self._ending = True
        self._connection.close()

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if message.get("terminate"):
                        self._on_terminate()
                    else:
                        self._messages.put(message)
        except (OSError, ValueError):
            pass  # a reset or half a line means that the other end is dead, like an end of file
        if not self._ending:
            self._on_lost()
        self._messages.put(None)


def meet(
    rank: int, world: int, *, on_lost: Callable[[int], None], on_terminate: Callable[[], None] = lambda: None
) -> dict[int, RankLink]:
    """Links by rank: to all others on rank 0, to rank 0 on the others. All ranks call it, once they have a group.

    Other threads call `on_lost(rank)` when that rank's end closes unexpectedly, and `on_terminate()` when a rank
    gets a stop signal.
    """
    if world == 1:
        return {}
    if rank == 0:
        return _listen(world, on_lost, on_terminate)
    where: list[Any] = [None, None]
    dist.broadcast_object_list(where, src=0)
    port, secret = where
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=MEETING_SECONDS)
    connection.settimeout(None)
    connection.sendall(json.dumps({"rank": rank, "secret": secret}).encode() + b"\n")
    return {0: RankLink(connection, lambda: on_lost(0), on_terminate)}


def _listen(world: int, on_lost: Callable[[int], None], on_terminate: Callable[[], None]) -> dict[int, RankLink]:
    address = os.environ["MASTER_ADDR"]
    everywhere = "" if address not in ("127.0.0.1", "localhost") else "127.0.0.1"
    secret = secrets.token_hex(16)
    links: dict[int, RankLink] = {}
    with socket.create_server((everywhere, 0), backlog=world) as listener:
        dist.broadcast_object_list([listener.getsockname()[1], secret], src=0)
        listener.settimeout(MEETING_SECONDS)
        while len(links) < world - 1:
            try:
                connection, _ = listener.accept()
            except TimeoutError as error:
                raise JobError(f"{world - 1 - len(links)} ranks didn't connect to rank 0 at {address}") from error
            if (peer := _greeting(connection, secret)) is not None:
                links[peer] = RankLink(connection, partial(on_lost, peer), on_terminate)
    return links


def _greeting(connection: socket.socket, secret: str) -> int | None:
    """The rank of a connection; None for another program, whose connection is closed."""
    connection.settimeout(5.0)
    try:
        line = b""
        while not line.endswith(b"\n") and len(line) < 200:
            line += connection.recv(1) or b"\n"
        hello = json.loads(line)
        if secrets.compare_digest(str(hello["secret"]), secret):
            connection.settimeout(None)
            return int(hello["rank"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # whoever it is, it isn't a rank
    connection.close()
    return None


def _notice_death(connection: socket.socket) -> None:
    """A dying process closes its sockets. For a dying machine the kernel probes the connection every 2 s."""
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 2), ("TCP_KEEPCNT", 2), ("TCP_USER_TIMEOUT", 8000)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
