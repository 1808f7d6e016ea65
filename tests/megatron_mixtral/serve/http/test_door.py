"""Who may come in: another site's page, a name that turned into this machine, a stranger without the key.

And what nobody may bring: more than the model's context needs, or what takes long to read.
"""

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

import pytest
import small_server

KEY = "the-key"
ASK = json.dumps({"prompt": "x", "max_tokens": 1}).encode()
JSON = {"Content-Type": "application/json"}
EVIL = [
    "evil.example",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "x/health?",
    "evil@127.0.0.1",
    "",
    "::1",
]


@pytest.fixture(scope="module")
def locked(served_model, tmp_path_factory):
    """A server with a key."""
    folder = tmp_path_factory.mktemp("locked")
    with small_server.server(folder, served_model[1], env={"MIXLAUNCH_API_KEY": KEY}) as running:
        yield running


def status(running, method, path, *, hosts=None, body=None, **headers):
    """Of a request with exactly these headers, as no polite client would send them."""
    there = urlsplit(running.url)
    connection = http.client.HTTPConnection(there.hostname, there.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for host in [there.netloc] if hosts is None else hosts:
        connection.putheader("Host", host)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


@pytest.mark.parametrize("host", [*EVIL, "/health", "localhost/health#", "localhost:1/health?x"])
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/", "/openapi.json", "/health/", "/%68ealth/x"])
def test_no_host_opens_a_route_without_the_key(locked, host, path):
    assert status(locked, "GET", path, hosts=[host]) in (400, 401)


def test_no_host_lets_a_question_in_without_the_key(locked):
    for host in EVIL:
        assert status(locked, "POST", "/v1/completions", hosts=[host], body=ASK, **JSON) in (400, 401)
    asked = {"Authorization": f"Bearer {KEY}", **JSON}
    assert status(locked, "POST", "/v1/completions", hosts=["models.example"], body=ASK, **asked) == 200
    assert status(locked, "GET", "/health", hosts=["models.example"]) == 200


@pytest.mark.parametrize("host", [*EVIL, "localhost:port", "10.0.0.1", "0.0.0.0", "[::]"])
def test_a_server_without_a_key_answers_to_no_other_name(plain_server, host):
    for path in ("/", "/v1/models", "/health"):
        assert status(plain_server, "GET", path, hosts=[host]) in (400, 403)
    assert status(plain_server, "POST", "/v1/completions", hosts=[host], body=ASK, **JSON) in (400, 403)


def test_a_server_without_a_key_answers_to_its_own_names_at_any_port(plain_server):
    for host in ("localhost", "LOCALHOST:8123", "127.0.0.1:1", "127.0.0.1", "[::1]:80", "[::1]", "127.1.2.3"):
        assert status(plain_server, "GET", "/v1/models", hosts=[host]) == 200
    assert status(plain_server, "GET", "/v1/models", hosts=[]) in (400, 403)
    assert status(plain_server, "GET", "/v1/models", hosts=["localhost", "evil.example"]) in (400, 403)


@pytest.mark.parametrize(
    "foreign",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Origin": "http://127.0.0.1.evil.example"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
    ],
)
def test_another_sites_page_gets_nothing(plain_server, foreign):
    assert status(plain_server, "GET", "/v1/models", **foreign) == 403
    assert status(plain_server, "POST", "/v1/completions", body=ASK, **JSON, **foreign) == 403
    assert status(plain_server, "PUT", "/api", body=b'{"prompts": ["x"]}', **JSON, **foreign) == 403


def test_the_servers_own_page_and_a_link_to_it_work(plain_server):
    own = {"Origin": plain_server.url, "Sec_Fetch_Site": "same-origin", **JSON}
    assert status(plain_server, "POST", "/v1/completions", body=ASK, **own) == 200
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert status(plain_server, "GET", "/", **link) == 200


@pytest.mark.parametrize(
    "kind", [None, "", "text/plain", "text/plain; application/json", "multipart/form-data", "text/json"]
)
def test_a_body_that_isnt_declared_as_json_is_refused(plain_server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    for method, path in (("POST", "/v1/completions"), ("PUT", "/api"), ("POST", "/v1/chat/completions")):
        assert status(plain_server, method, path, body=ASK, **headers) == 400
    for good in ("application/json", "Application/JSON; charset=utf-8"):
        assert status(plain_server, "POST", "/v1/completions", body=ASK, **{"Content-Type": good}) == 200


def chat(**more):
    return {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1} | more


def repeated(item, size):
    """A JSON list of about `size` bytes."""
    text = json.dumps(item)
    return "[" + ",".join([text] * (size // (len(text) + 1))) + "]"


def heavy(size):
    """Bodies of about `size` bytes that once kept the server busy, and their kin."""
    word = {"role": "user", "content": "x"}
    names = json.dumps({f"{i:x}": 1 for i in range(size // 10)})
    numbers = json.dumps({str(i): 1 for i in range(size // 10)})
    yield from (
        ("/v1/chat/completions", f'{{"messages": {repeated(word, size)}}}'),
        ("/v1/chat/completions", f'{{"messages": {repeated({"role": "user", "content": "word " * 200}, size)}}}'),
        ("/v1/chat/completions", f'{{"messages": {repeated({}, size)}}}'),
        ("/v1/chat/completions", f'{{"messages": [{{"role": "user", "content": {repeated({"a": 1}, size)}}}]}}'),
        ("/v1/chat/completions", json.dumps(chat())[:-1] + f', "metadata": {names}}}'),
        ("/v1/chat/completions", json.dumps(chat())[:-1] + f', "logit_bias": {numbers}}}'),
        ("/v1/chat/completions", json.dumps(chat())[:-1] + "," + names[1:]),
        ("/v1/chat/completions", json.dumps(chat(stop=["y" * (size // 2)]))),
        ("/v1/completions", json.dumps({"prompt": "a" * size})),
        ("/v1/completions", json.dumps({"prompt": "\u4e2d" * (size // 6)})),
        ("/v1/completions", f'{{"prompt": {repeated(1, size)}}}'),
        ("/v1/completions", f'{{"prompt": {repeated("a", size)}}}'),
        ("/v1/completions", f'{{"prompt": {repeated([1], size)}}}'),
        ("/v1/completions", f'{{"prompt": {repeated([], size)}}}'),
        ("/v1/completions", f'{{"prompt": {repeated(["x" * 50], size)}}}'),
        ("/v1/completions", f'{{"prompt": "x", "stop": {repeated("", size)}}}'),
        ("/api", f'{{"prompts": {repeated("a", size)}}}'),
        ("/api", f'{{"prompts": ["x"], "stop_words": {repeated(1, size)}}}'),
    )


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """A server whose context is as long as is usual."""
    folder = tmp_path_factory.mktemp("usual")
    hub = small_server.make_model(folder / "hub", max_position_embeddings=4096)
    with small_server.server(folder, hub, max_tokens=4096) as running:
        yield running


class Pulse:
    """Asks `/health` all the time, and knows the longest wait."""

    def __init__(self, running):
        self._client, self.longest, self._over = running.client(), 0.0, False
        self._thread = threading.Thread(target=self._beat)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over = True
        self._thread.join()

    def _beat(self):
        while not self._over:
            begin = time.monotonic()
            assert self._client.get("/health").status_code == 200
            self.longest = max(self.longest, time.monotonic() - begin)
            time.sleep(0.01)


@pytest.mark.alone
@pytest.mark.parametrize("size", [31_000_000, 4_000_000, 450_000])
def test_no_body_keeps_the_server_from_others(usual, size):
    for path, body in heavy(size):
        with usual.client(headers=JSON) as client, Pulse(usual) as pulse:
            begin = time.monotonic()
            reply = client.post(path, content=body)
            took = time.monotonic() - begin
        assert reply.status_code in (200, 400, 413), (path, body[:80], reply.text)
        assert took < 1, (path, body[:80], took)
        assert pulse.longest < 0.3, (path, body[:80], pulse.longest)


def test_a_refusal_names_the_limit_and_whole_contexts_pass(plain_server, words):
    with plain_server.client(headers=JSON) as client:

        def said(path, **body):
            return client.post(path, json=body).json()["error"]["message"]

        many = [{"role": "user", "content": "x"}] * 300
        assert "300 messages are more than this model's context of 256 tokens" in said(
            "/v1/chat/completions", messages=many
        )
        assert "1025 entries; at most 1024" in said(
            "/v1/completions", prompt="x", logit_bias={str(i): 0 for i in range(1025)}
        )
        assert "65 entries; at most 64" in said(
            "/v1/completions", prompt="x", metadata={str(i): "" for i in range(65)}
        )
        assert "at most 128 items" in said("/v1/completions", prompt=["x"] * 129)
        assert "at most 128 items" in said("/v1/completions", prompt=[[1]] * 129)
        assert "more than 98304 values" in said("/v1/completions", prompt=[1] * 98306)
        assert "more than 65536 values" in said("/v1/completions", prompt=[[]] * 66000)
        assert "4097 characters are more" in said("/v1/completions", prompt="x" * 4097)
        body = "bytes, which is more than this model's context needs"
        assert body in said("/v1/chat/completions", messages=[{"role": "user", "content": "x" * 200_000}])
        longest = max((words.piece(i) for i in range(words.vocab_size)), key=len)
        escaped = json.dumps({"prompt": [longest.replace("\u2581", " ") * 200] * 8, "max_tokens": 1})
        assert client.post("/v1/completions", content=escaped).status_code == 200
        ids = [[29871] * 255] * 128
        assert client.post("/v1/completions", json={"prompt": ids, "max_tokens": 1}).status_code in (200, 429)
