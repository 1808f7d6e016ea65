"""Notices a client that disconnects during a non-streamed answer, and cancels its requests."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from megatron_mixtral.serve.admission import Stream

T = TypeVar("T")


async def all_or_gone(
    http: HttpRequest, streams: Sequence[Stream], work: Sequence[Coroutine[Any, Any, T]]
) -> list[T]:
    """The results of all `work`, in order; raises the first failure, or `ClientDisconnect` if the client leaves.

    In every case all requests of `streams` end.
    """
    working = asyncio.gather(*work)
    leaving = asyncio.create_task(_left(http))
    either: set[asyncio.Future[Any]] = {working, leaving}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.wait({working})  # nobody else retrieves its result
        for stream in streams:
            stream.close()


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
