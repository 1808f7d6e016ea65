"""Keep a server busy for a while as a crowd of different clients would, and watch what it keeps of them.

First as fast as it goes, which is its capacity; then for as long as asked at a share of that, arrivals at random.
"""

import asyncio
import random
import time
from dataclasses import dataclass, field

import httpx
import psutil

STEADY = {"prompt": "Once upon a time", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
WORDS = ("the", "quick", "brown fox", "jumps", "over", "a lazy dog", "while", "wizards", "box with", "jugs")
SAMPLE_SECONDS = 1.0


@dataclass
class Watched:
    """What came of one soak."""

    seconds: float = 0.0
    capacity: float = 0.0  # requests a second
    answered: int = 0
    left: int = 0  # clients that hung up on purpose
    errors: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)  # seconds to a whole answer
    memory: list[float] = field(default_factory=list)  # MB of all ranks, as time went
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    @property
    def growth(self) -> float:
        """MB between the first and the last fifth of the time, each by its median."""
        fifth = max(len(self.memory) // 5, 1)
        first, last = sorted(self.memory[:fifth]), sorted(self.memory[-fifth:])
        return last[len(last) // 2] - first[len(first) // 2]

    def wait(self, share: float) -> float:
        return sorted(self.waits)[int(len(self.waits) * share)]


def soak(running, *, seconds: float, share: float = 0.8, probe_seconds: float = 5.0, seed: int = 1) -> Watched:
    """Warm up, measure the capacity for `probe_seconds`, then ask at `share` of it for `seconds`."""
    return asyncio.run(_soak(running, seconds, share, probe_seconds, random.Random(seed)))


async def _soak(running, seconds, share, probe_seconds, draw) -> Watched:
    found = Watched()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
    async with httpx.AsyncClient(base_url=running.url, timeout=120, limits=limits) as client:
        steady = (await client.post("/v1/completions", json=STEADY)).json()["choices"][0]["text"]
        await _as_fast_as_it_goes(client, steady, probe_seconds / 2, draw)  # what the first ones make it keep
        found.capacity = await _as_fast_as_it_goes(client, steady, probe_seconds, draw)
        watching = asyncio.create_task(_watch(running, found))
        begin, due, asked = time.monotonic(), 0.0, []
        while (now := time.monotonic() - begin) < seconds:
            asked.append(asyncio.create_task(_one(client, steady, draw.random(), random.Random(len(asked)), found)))
            asked = [task for task in asked if not task.done()] if len(asked) > 2000 else asked
            # By the clock: pauses one after another ask for less than the share where the machine is busy.
            due += draw.expovariate(found.capacity * share)
            await asyncio.sleep(max(0.0, due - (time.monotonic() - begin)))
        await asyncio.gather(*asked)
        found.seconds = now
        watching.cancel()
    return found


async def _as_fast_as_it_goes(client, steady, seconds, draw) -> float:
    """Requests a second with always more clients than the server takes at once."""
    found, end, begin = Watched(), time.monotonic() + seconds, time.monotonic()

    async def ask_again():
        while time.monotonic() < end:
            await _one(client, steady, draw.uniform(0.1, 1), draw, found)

    await asyncio.gather(*(ask_again() for _ in range(16)))
    assert not found.errors, found.errors[:3]
    return found.answered / (time.monotonic() - begin)


async def _one(client, steady, kind, draw, found) -> None:
    """One client: some leave, some stream, some ask for always the same and compare."""
    text = " ".join(draw.choices(WORDS, k=draw.randrange(1, 40)))
    body = {"max_tokens": draw.randrange(1, 30), "seed": draw.randrange(1000), "temperature": 0.8}
    begin = time.monotonic()
    try:
        if kind < 0.1:
            await _leave(client, {**body, "prompt": text, "stream": True, "ignore_eos": True, "max_tokens": 60})
            found.left += 1
            return
        if kind < 0.3:
            answer = (await client.post("/v1/completions", json=STEADY)).raise_for_status().json()
            if answer["choices"][0]["text"] != steady:
                found.errors.append(f"another answer: {answer}")
        elif kind < 0.6:
            chat = {**body, "messages": [{"role": "user", "content": text}], "stream": True}
            lines = (await client.post("/v1/chat/completions", json=chat)).raise_for_status().text.strip()
            # Not the word alone: the model may say it.
            if not lines.endswith("data: [DONE]") or 'data: {"error"' in lines:
                found.errors.append(lines[-200:])
        else:
            more = {"prompt": [text, "x"], "n": 2, "logprobs": 2, "echo": draw.random() < 0.5}
            (await client.post("/v1/completions", json=body | more)).raise_for_status()
    except httpx.HTTPError as error:
        found.errors.append(f"{type(error).__name__}: {error}")
        return
    found.answered += 1
    found.waits.append(time.monotonic() - begin)


async def _leave(client, body) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for _ in response.aiter_lines():
            return


async def _watch(running, found) -> None:
    ranks = [psutil.Process(process.pid) for process in running.job.processes]
    while True:
        found.memory.append(sum(rank.memory_info().rss for rank in ranks) / 2**20)
        found.descriptors.append(sum(rank.num_fds() for rank in ranks))
        found.threads.append(sum(rank.num_threads() for rank in ranks))
        await asyncio.sleep(SAMPLE_SECONDS)
