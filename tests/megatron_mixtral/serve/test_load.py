"""Crowds, quitters and nonsense: everyone gets an answer or a refusal, and the server stays itself."""

import asyncio
import json
import random
import socket
import string
import subprocess
import sys
import time
from contextlib import contextmanager

import httpx
import psutil
import pytest
import small_server

BODY = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0, "ignore_eos": True}
LONG = BODY | {"max_tokens": 200}


@pytest.fixture(scope="module")
def running(served_model, tmp_path_factory):
    with small_server.server(tmp_path_factory.mktemp("load"), served_model[1], queue=16) as server:
        yield server
        assert server.stop() == [0]


def memory(running):
    return psutil.Process(running.job.processes[0].pid).memory_info().rss / 2**20


def clients(running):
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=running.url, timeout=60, limits=limits)


def idle(running):
    return running.metric("requests_running") == 0 and running.metric("requests_queued") == 0


@pytest.mark.alone
def test_200_clients_that_leave_cost_the_next_one_nothing(running):
    async def leave(client, stream):
        try:
            async with asyncio.timeout(0.5):
                await client.post("/v1/completions", json=LONG | {"stream": stream})
        except TimeoutError:
            pass

    async def main():
        async with clients(running) as client:
            await asyncio.gather(*(leave(client, i % 2 == 0) for i in range(200)))
            begin = time.monotonic()
            reply = await client.post("/v1/completions", json=BODY)
            return reply.status_code, time.monotonic() - begin

    status, seconds = asyncio.run(main())
    assert status == 200
    assert seconds < 5
    running.until(lambda: idle(running), 10)
    running.until(lambda: running.metric("kv_cache_used_ratio") == 0, 10)


@pytest.mark.alone
def test_a_client_that_leaves_frees_its_place_within_a_second(running):
    with (
        running.client() as client,
        client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply,
    ):
        lines = reply.iter_lines()
        next(lines)
        assert running.metric("requests_running") == 1
    assert running.until(lambda: idle(running), 2) < 1


PROBE = """
import http.client, sys, time
host, port = sys.argv[1], int(sys.argv[2])
print("probing", flush=True)
while True:
    begin = time.monotonic()
    connection = http.client.HTTPConnection(host, port, timeout=30)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    print(time.monotonic() - begin, flush=True)
    time.sleep(0.01)
"""


@contextmanager
def probing_health(running):
    """A process of its own that asks again and again; the seconds of each answer are in the list afterwards."""
    host, port = running.state["host"], str(running.state["port"])
    waits = []
    with subprocess.Popen([sys.executable, "-c", PROBE, host, port], stdout=subprocess.PIPE, text=True) as probe:
        assert probe.stdout.readline() == "probing\n"
        try:
            yield waits
        finally:
            probe.terminate()
            waits += [float(line) for line in probe.stdout.read().splitlines()]


@pytest.mark.alone
def test_500_clients_on_a_queue_of_16_get_an_answer_or_a_429(running):
    async def main():
        async with clients(running) as client:
            return await asyncio.gather(*(client.post("/v1/completions", json=BODY) for _ in range(500)))

    asyncio.run(main())  # what a first crowd makes the process keep is no leak
    before = memory(running)
    with probing_health(running) as waits:
        replies = asyncio.run(main())
    assert {reply.status_code for reply in replies} == {200, 429}
    refused = next(reply for reply in replies if reply.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert sum(reply.status_code == 200 for reply in replies) >= 16 + 8
    assert len({reply.json()["choices"][0]["text"] for reply in replies if reply.status_code == 200}) == 1
    assert memory(running) - before < 50
    assert len(waits) > 20
    assert sorted(waits)[int(len(waits) * 0.99)] < 0.2, sorted(waits)[-5:]
    assert idle(running)


@pytest.mark.alone
def test_answers_are_not_held_back(running):
    """40 ms each, where Nagle's algorithm waits for the client's delayed acknowledgement."""
    waits = []
    with running.client() as client:
        for _ in range(21):
            begin = time.monotonic()
            client.get("/v1/models")
            waits.append(time.monotonic() - begin)
    assert sorted(waits)[10] < 0.03


@pytest.mark.alone
def test_slow_readers_and_idle_sockets_slow_nobody_much(running):
    """What is made for those who don't read waits for them, not the engine; they still get all of it."""

    def seconds():
        begin = time.monotonic()
        for _ in range(3):
            assert running.client().post("/v1/completions", json=BODY).status_code == 200
        return time.monotonic() - begin

    seconds()
    alone = seconds()
    before, answered, began = (
        memory(running),
        finished(running),
        running.metric("time_to_first_token_seconds_count"),
    )
    idlers = [connect(running) for _ in range(300)]
    slow = [connect(running, receive_buffer=4096) for _ in range(6)]
    try:
        for one in slow:
            send(one, BODY | {"stream": True, "n": 4, "logprobs": 20, "max_tokens": 100})
        running.until(lambda: running.metric("time_to_first_token_seconds_count") == began + 24, 60)
        running.until(lambda: idle(running), 60)
        assert finished(running) == answered, "all of it fitted into buffers, so nobody was slow"
        assert seconds() < 2 * alone + 0.2
        assert memory(running) - before < 50
        assert read_to_end(slow[0]).rstrip().endswith(b"data: [DONE]")
    finally:
        for one in idlers + slow:
            one.close()


def connect(running, receive_buffer=None):
    one = socket.socket()
    if receive_buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    one.connect((running.state["host"], running.state["port"]))
    return one


def send(connection, body):
    content = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)


def finished(running):
    """Completions that were answered to their end."""
    line = 'mixlaunch_http_requests_total{route="/v1/completions",status="200"} '
    text = running.client().get("/metrics").text
    return float(next(found.split()[-1] for found in text.splitlines() if found.startswith(line)))


def read_to_end(connection):
    connection.settimeout(30)
    parts = b""
    while part := connection.recv(1 << 16):
        parts += part
    return parts.rpartition(b"\r\n0\r\n")[0] or parts


NAMES = """
    prompt messages model stream n temperature top_p top_k seed stop logprobs echo max_tokens best_of logit_bias
    stream_options presence_penalty frequency_penalty top_logprobs prompts tokens_to_generate stop_token add_BOS x
""".split()  # noqa: SIM905 - a list of so many words is harder to read


def junk(draw, depth=0):
    """Any JSON value, likely a nasty one."""
    kind = draw.randrange(12 if depth < 3 else 9)
    if kind == 9:
        return [junk(draw, depth + 1) for _ in range(draw.randrange(4))]
    if kind >= 10:
        return {draw.choice(NAMES): junk(draw, depth + 1) for _ in range(draw.randrange(4))}
    return [
        None,
        draw.choice([True, False]),
        draw.randrange(-3, 40),
        draw.choice([2**31, 2**63, 2**64, -(2**63), 10**30, 0]),
        draw.choice([0.5, -1.5, 1e308, float("nan"), float("inf")]),
        "".join(draw.choices(string.printable + "\ud800\x00é😀", k=draw.randrange(6))),
        [draw.randrange(0, 33000) for _ in range(draw.randrange(5))],
        {"role": draw.choice(["user", "system", "assistant", "tool"]), "content": draw.choice(["hi", "", None, 3])},
        ["a", "b"],
    ][kind]


def nonsense(draw):
    """Bytes that look like a body: mostly a real one with some fields spoilt."""
    body = draw.choice(
        [
            {"prompt": "x", "max_tokens": 2},
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2},
            {"prompts": ["x"], "tokens_to_generate": 2},
        ]
    )
    body = body | {draw.choice(NAMES): junk(draw) for _ in range(draw.choice([0, 1, 1, 1, 2, 3]))}
    if isinstance(body.get("max_tokens"), type(None)):
        body["max_tokens"] = 2  # else a chat goes on to the end of its context, which is right but slow
    content = json.dumps(body).encode()
    if draw.random() < 0.15:
        content = content[: draw.randrange(len(content))] + bytes(draw.choices(range(256), k=draw.randrange(4)))
    return content


def test_2000_fuzzed_bodies_are_answered_or_refused(running):
    draw = random.Random(17)
    routes = [("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("PUT", "/api")]
    seen = {}
    with running.client(headers={"Content-Type": "application/json"}) as client:
        for _ in range(2000):
            content = nonsense(draw)
            method, path = draw.choice(routes)
            reply = client.request(method, path, content=content)
            seen[reply.status_code] = seen.get(reply.status_code, 0) + 1
            assert reply.status_code in (200, 400, 404), (path, content, reply.text)
            if reply.status_code != 200:
                message = reply.json()["message"] if path == "/api" else reply.json()["error"]["message"]
                assert message
    assert seen[200] > 50
    assert seen[400] > 500
    assert running.client().post("/v1/completions", json=BODY).status_code == 200
    assert running.job.processes[0].poll() is None


# Not among them: that whatever fits the schema is accepted. Some rules join fields (a prompt and its answer share
# the context, top_logprobs needs logprobs), which a schema can't say.
CHECKS = (
    *("not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("negative_data_rejection", "unsupported_method"),
)


def test_the_servers_own_description_is_kept_whatever_schemathesis_makes_of_it(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1], max_tokens=24, max_batch=64) as running:
        schemathesis(running, tmp_path)
        assert running.stop() == [0]


def schemathesis(running, tmp_path):
    argv = [sys.executable, "-m", "schemathesis.cli", "run", f"{running.url}/openapi.json", "--no-color"]
    argv += ["--checks", ",".join(CHECKS), "--max-examples", "5", "--seed", "1", "--phases", "coverage,fuzzing"]
    argv += ["--request-timeout", "60"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "Tested: 10" in done.stdout


@pytest.mark.parametrize("depth", [100_000])
def test_monstrous_bodies_are_refused(running, depth):
    client = running.client(headers={"Content-Type": "application/json"})
    assert client.post("/v1/completions", content=b"[" * depth).status_code == 400
    assert client.post("/v1/completions", content=b'{"prompt": ' + b"[" * depth).status_code == 400
    big = b'{"prompt": "' + b"x" * (33 * 2**20) + b'"}'
    assert client.post("/v1/completions", content=big).status_code == 413

    def in_parts():
        for _ in range(34):
            yield b"x" * 2**20

    assert client.post("/v1/completions", content=in_parts()).status_code == 413
    assert client.get("/health").status_code == 200
