"""Notice a client that hangs up while its whole answer is still being made, and drop the work."""

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
    """The results of all `work`, in order; the first failure, or `ClientDisconnect` when the client leaves.

    However it ends, no request of `streams` goes on.
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
        await asyncio.wait({working})  # nobody else hears how it ended
        for stream in streams:
            stream.close()


async def _left(http: HttpRequest) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
