"""How a server begins, refuses, ends and fails: keys, signals, dead ranks; nothing hangs and nothing stays."""

import base64
import json
import shutil
import signal
import socket
import threading
import time

import httpx
import psutil
import pytest
import small_server
from run_job import Job

from megatron_mixtral.errors import InputError
from megatron_mixtral.serve import setup
from megatron_mixtral.spec.jobs import ServeConfig

KEY = "s3cret-for-this-test"
LONG = {"prompt": "Once upon a time", "max_tokens": 200, "temperature": 0, "ignore_eos": True}


def in_background(function):
    """Start `function` in a thread; call the result for what it returned or raised."""
    box = []

    def work():
        try:
            box.append(function())
        except httpx.HTTPError as error:
            box.append(error)

    thread = threading.Thread(target=work)
    thread.start()

    def result():
        thread.join(30)
        assert not thread.is_alive(), "the client hangs"
        return box[0]

    return result


def generate(running, **body):
    return running.client().post("/v1/completions", json=LONG | body)


def started(running):
    return running.metric("requests_running") > 0


@pytest.fixture
def guarded(served_model, tmp_path):
    """A server with a key, whose port somebody else has already."""
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        small_server.server(
            *(tmp_path, served_model[1]),
            env={"MIXLAUNCH_API_KEY": KEY},
            port=other.getsockname()[1],
            other_port=True,
        ) as running,
    ):
        yield other.getsockname()[1], running


def test_without_the_key_only_health_answers(guarded, tmp_path):
    taken, running = guarded
    check_port(taken, running)
    with running.client() as client:
        assert client.get("/health").status_code == 200
        routes = json.loads(client.get("/openapi.json", headers=bearer(KEY)).text)["paths"]
        asked = [(m, p) for p, methods in routes.items() for m in methods if p != "/health"]
        asked += [("get", "/"), ("get", "/openapi.json"), ("get", "/nowhere")]
        assert len(asked) > 10
        for method, path in asked:
            for headers in (
                {},
                bearer("wrong"),
                {"Authorization": "Bearer"},
                {"Authorization": "Basic !"},
                basic("wrong"),
            ):
                reply = client.request(method, path, headers=headers)
                assert reply.status_code == 401, (method, path)
                assert "error" in reply.json() or path == "/api"
        for headers in (bearer(KEY), basic(KEY)):
            assert client.get("/v1/models", headers=headers).status_code == 200
            assert client.get("/", headers=headers).status_code == 200
        generate_ok = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers=bearer(KEY))
        assert generate_ok.status_code == 200
        assert running.stop() == [0]
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or KEY not in path.read_text(), path


def check_port(taken, running):
    """The next free one is taken instead, and everybody is told."""
    assert taken < running.state["port"] <= taken + 100
    assert running.state["taken"] == taken
    assert running.client().get("/health").status_code == 200
    assert f"port {taken} is in use; this server uses {running.state['port']}" in running.job.output()
    loaded = running.job.events("progress")[-1]
    assert loaded["done"] == loaded["total"] > 1e6


def bearer(key):
    return {"Authorization": f"Bearer {key}"}


def basic(key):
    return {"Authorization": "Basic " + base64.b64encode(f"me:{key}".encode()).decode()}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"host": "0.0.0.0"}, "MIXLAUNCH_API_KEY"),
        ({"model": "/no/such"}, "/no/such"),
        ({"max_tokens": 100_000}, "512"),
        ({"layout": {"pipeline": 2}}, "1 rank doesn't fit"),
        ({"max_batch": 0}, "max_batch"),
        ({"precision": "fp8"}, "precision"),
        ({"engine": "vllm", "fp8_experts": True}, "fp8_experts: needs engine megatron"),
    ],
)
def test_mistakes_end_with_2_and_one_line(served_model, tmp_path, config, says):
    settings = {"model": str(served_model[1]), "port": 0, "max_tokens": 256}
    with Job("serve", settings | config, tmp_path) as job:
        assert job.wait(30) == [2]
        output = job.outputs[0].read_text().strip()
        assert output.startswith("error: ")
        assert says in output
        assert "\n" not in output
        assert not (tmp_path / "server.json").exists()


@pytest.mark.parametrize("key", ["two words", "naïve", "ends\n"])
def test_a_key_that_clients_cannot_send_is_refused(monkeypatch, key):
    monkeypatch.setenv("MIXLAUNCH_API_KEY", key)
    with pytest.raises(InputError, match="can't send"):
        setup.checked_key(ServeConfig(model="x"))


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(served_model, tmp_path):
    folder = shutil.copytree(served_model[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 999}))
    with pytest.raises(InputError, match="32000 tokens, but the model knows 999"):
        setup.checked(ServeConfig(model=str(folder)))


def test_a_taken_port_is_said_at_once(served_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with Job("serve", {"model": str(served_model[1]), "port": port, "max_tokens": 256}, tmp_path) as job:
            assert job.wait(20) == [2]
            assert str(port) in job.output()


def test_a_drain_lets_answers_end_and_takes_nothing_new(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1], drain_seconds=20) as running:
        answers = [in_background(lambda: generate(running)) for _ in range(4)]
        running.until(lambda: running.metric("requests_running") == 4, 10)
        running.job.signal(0, signal.SIGTERM)
        running.until(lambda: running.client().get("/ready").status_code == 503, 2)
        late = generate(running)
        assert (late.status_code, late.json()["error"]["type"]) == (503, "service_unavailable_error")
        assert running.client().get("/health").status_code == 200
        for answer in answers:
            assert answer().json()["usage"]["completion_tokens"] == 200
        assert running.job.wait(15) == [0]
        assert not (tmp_path / "server.json").exists()
        assert running.job.events("exit")[-1]["code"] == 0


@pytest.mark.alone
def test_without_time_to_drain_it_is_gone_within_4_seconds(served_model, tmp_path):
    with small_server.server(
        tmp_path, served_model[1], ranks=2, layout={"pipeline": 2}, drain_seconds=0
    ) as running:
        answers = [in_background(lambda: generate(running)) for _ in range(3)]
        running.until(lambda: started(running), 10)
        processes = [psutil.Process(p.pid) for p in running.job.processes]
        children = [child for p in processes for child in p.children(recursive=True)]
        begin = time.monotonic()
        assert running.stop(10) == [0, 0]
        assert time.monotonic() - begin < 4
        assert not [c for c in children if c.is_running()]
        for answer in answers:
            reply = answer()
            assert isinstance(reply, httpx.HTTPError) or reply.status_code == 503


def test_any_rank_that_is_told_to_stop_stops_all(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1], ranks=2, layout={"pipeline": 2}) as running:
        running.job.signal(1, signal.SIGUSR2)
        assert running.job.wait(15) == [0, 0]


@pytest.mark.alone
@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"expert": 2}], ids=["PP2", "EP2"])
def test_a_dead_rank_is_news_to_every_client_within_5_seconds(served_model, tmp_path, layout):
    with small_server.server(tmp_path, served_model[1], ranks=2, layout=layout) as running:
        whole = [in_background(lambda: generate(running)) for _ in range(3)]
        streamed = in_background(lambda: generate(running, stream=True))
        running.until(lambda: running.metric("requests_running") == 4, 10)
        running.job.signal(1, signal.SIGKILL)
        begin = time.monotonic()
        assert running.until(lambda: running.client().get("/health").status_code == 503, 5) < 5
        running.job.signal(0, signal.SIGTERM)  # as the script and srun do once a rank has died
        assert [answer().status_code for answer in whole] == [503] * 3
        assert "service_unavailable_error" in streamed().text
        time.sleep(0.5)
        assert running.client().get("/health").status_code == 503
        assert time.monotonic() - begin < 5
        assert all(code != 0 for code in running.job.wait(10))
        assert not (tmp_path / "server.json").exists()
        assert running.job.events("exit")[-1]["code"] == 1


def test_a_rank_that_dies_between_requests_is_noticed_too(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1], ranks=2, layout={"pipeline": 2}) as running:
        running.job.signal(1, signal.SIGKILL)
        running.until(lambda: running.client().get("/health").status_code == 503, 5)
        assert all(code != 0 for code in running.job.wait(10))


def test_ranks_do_not_outlive_rank_0(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1], ranks=2, layout={"pipeline": 2}) as running:
        running.job.signal(0, signal.SIGKILL)
        assert running.job.wait(10)[1] != 0
