"""The waiting room's bounds, by requests and by tokens, without a server."""

import asyncio

import pytest

from megatron_mixtral.serve.admission import Limits, Refused, Service, Unavailable
from megatron_mixtral.serve.messages import Cancel, Request, Token
from megatron_mixtral.serve.metrics import Metrics


def inside_a_loop(check):
    async def main():
        check()

    asyncio.run(main())


def service(orders, **limits):
    values = {"context": 100, "running": 2, "queued": 2, "tokens": 1000}
    return Service(Limits(**{**values, **limits}), orders.append, Metrics())


def request(id, prompt=10, answer=10):
    return Request(id=id, prompt=[1] * prompt, max_tokens=answer, seed=0)


def gauge(room, name):
    line = next(x for x in room.metrics.text().decode().splitlines() if x.startswith(f"mixlaunch_{name} "))
    return float(line.split()[-1])


def test_more_requests_than_run_and_wait_are_refused_until_one_ends():
    def check():
        orders = []
        room = service(orders)
        for id in range(4):
            room.open([request(id)])
        with pytest.raises(Refused):
            room.open([request(9)])
        assert (gauge(room, "requests_running"), gauge(room, "requests_queued")) == (2, 2)
        assert gauge(room, "requests_refused_total") == 1
        room.deliver([Token(0, 5, finish="stop")])
        room.open([request(10)])
        assert [order.id for order in orders] == [0, 1, 2, 3, 10]

    inside_a_loop(check)


def test_the_tokens_that_may_come_are_bounded_too():
    def check():
        room = service([], running=8, queued=8, tokens=100)
        (first,) = room.open([request(1, prompt=30, answer=40)])
        with pytest.raises(Refused):
            room.open([request(2, prompt=1, answer=30)])
        room.open([request(3, prompt=1, answer=29)])
        first.close()
        room.open([request(4, prompt=30, answer=40)])

    inside_a_loop(check)


def test_a_call_larger_than_the_queue_gets_in_alone_and_as_a_whole():
    def check():
        orders = []
        room = service(orders)
        streams = room.open([request(id) for id in range(7)])
        with pytest.raises(Refused):
            room.open([request(9)])
        for stream in streams:
            stream.close()
            stream.close()  # once more is nothing
        assert orders[7:] == [Cancel(id) for id in range(7)]
        room.open([request(10)])

    inside_a_loop(check)


def test_nobody_gets_in_once_it_drains_or_has_failed():
    async def main():
        room = service([])
        (stream,) = room.open([request(1)])
        room.begin_drain()
        with pytest.raises(Unavailable):
            room.open([request(2)])
        room.fail("rank 1 is gone")
        with pytest.raises(Unavailable, match="rank 1 is gone"):
            await stream.__anext__()
        await asyncio.wait_for(room.drained(), 1)

    asyncio.run(main())
