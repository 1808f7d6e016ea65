"""A server from its plan to the line that asks it: which folder, which port, what is said while one waits."""

import dataclasses
import http.server
import json
import shlex
import socket
import subprocess
import threading

import pytest

from launcher.cli import watch
from launcher.cluster import profile
from launcher.errors import UsageError
from launcher.planning import inputs, jobs
from launcher.runs import record as runs
from launcher.runs import servers, states
from launcher.runs.record import Run
from launcher.runs.states import State
from launcher.submit import start
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.shape import PUBLISHED

KEY = "a-key-nobody-sees"


@pytest.fixture
def run(tmp_path):
    """A server's run directory on a cluster."""
    record = {"job": "serve", "profile": {"name": "c", "scheduler": "slurm"}, "jobs": ["7"]}
    return Run(path=tmp_path, record=record)


def tell(run, *events, **state):
    (run.path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if state:
        (run.path / "server.json").write_text(json.dumps({"model": "m", **state}))


def test_a_download_is_served_until_there_is_a_conversion(write_profile, tmp_path):
    paths = f"paths: {{models: {tmp_path}, data: {tmp_path}, runs: {tmp_path}}}"
    cluster = profile.read(write_profile(paths))
    assert inputs.servable(cluster, "mistralai/M") == "mistralai/M"
    (tmp_path / "M").mkdir()
    assert inputs.servable(cluster, "mistralai/M") == str(tmp_path / "M")
    assert inputs.servable(cluster, str(tmp_path / "other")) == str(tmp_path / "other")
    assert inputs.servable(cluster, "M") == "M"  # a run
    (tmp_path / "M-megatron").mkdir()
    assert inputs.servable(cluster, "mistralai/M") == "mistralai/M"


def test_a_port_that_was_asked_for_must_be_free_here():
    local = profile.load("local")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        taken = jobs.plan_serve(local, model="/m", port=port)
        with pytest.raises(UsageError, match=f"{port}: Address already in use; without --port"):
            start.require_port(taken)
    start.require_port(taken)
    start.require_port(jobs.plan_serve(local, model="/m"))


def test_the_line_to_copy_works_and_shows_no_key(run):
    """curl reads the key from its file."""
    asked = {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.update(self.headers)
            asked["body"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.handle_request).start()
    (run.path / "secrets.env").write_text(f"MIXLAUNCH_API_KEY={KEY}\n")
    tell(run, url=f"http://127.0.0.1:{server.server_port}", taken=5000)
    facts = dict(servers.how_to_ask(run))
    assert "port 5000 is taken" in facts["ready"]
    assert KEY not in json.dumps(facts)
    subprocess.run(["bash", "-c", facts["ask"]], check=True, capture_output=True)
    assert asked["Authorization"] == f"Bearer {KEY}"
    assert asked["body"]["messages"][0]["role"] == "user"
    server.server_close()


def test_waiting_tells_the_queue_the_loading_and_the_address(run, monkeypatch, capsys):
    told = iter([State(state="PENDING", source="slurm", reason="Resources")] * 3)
    now = iter(range(0, 1000, 5))
    monkeypatch.setattr(states, "of_run", lambda _: next(told, State(state="RUNNING", source="slurm")))
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(now))
    loading = {"event": "progress", "done": 2e9, "total": 4e9, "unit": "bytes"}
    monkeypatch.setattr(watch.going_on, "events", lambda _: iter([{}, {}, loading, {"event": "ready", "url": "x"}]))
    tell(run, url="http://node:5001")
    assert watch.to_ready(run) == 0
    said = capsys.readouterr().out
    assert said.count("in the queue: next in line") == 1
    assert "loading 2GB of 4GB" in said
    assert (
        shlex.split(next(x for x in said.splitlines() if " ask " in x))[2] == "http://node:5001/v1/chat/completions"
    )
    assert f"mixlaunch chat {run.name}" in said


def test_a_server_that_ends_before_it_is_ready_ends_as_its_job_did(run, monkeypatch, capsys):
    failed = State(state="FAILED", source="slurm", exit_code=2)
    monkeypatch.setattr(states, "of_run", lambda _: failed)
    monkeypatch.setattr(watch.going_on, "events", lambda _: iter([{}]))
    assert watch.to_ready(run) == 2
    assert "ended as FAILED" in capsys.readouterr().out


def test_of_several_servers_the_newest_that_answers_is_found(tmp_path):
    """One whose node died couldn't take its word back."""
    with socket.create_server(("127.0.0.1", 0)) as alive:
        threading.Thread(target=answer_once, args=(alive,), daemon=True).start()
        for number, port in enumerate((alive.getsockname()[1], 9), 1):
            folder = tmp_path / f"serve-{number}"
            folder.mkdir()
            record = {"schema": runs.SCHEMA, "job": "serve", "name": folder.name, "jobs": []}
            record |= {"host": "here", "resumable": True, "cancelled": False}
            record |= {
                "profile": {"name": "local", "scheduler": "local"},
                "created": f"2026-01-0{number}T00:00:00Z",
            }
            (folder / rundir.RECORD).write_text(json.dumps(record))
            (folder / "server.json").write_text(json.dumps({"url": f"http://127.0.0.1:{port}", "model": "m"}))
        assert servers.choose(None, [tmp_path]).url == f"http://127.0.0.1:{alive.getsockname()[1]}"


def answer_once(listener):
    connection, _ = listener.accept()
    connection.recv(1000)
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
    connection.close()


def test_a_model_with_a_short_context_serves_that_unless_told_otherwise(cluster):
    short = dataclasses.replace(PUBLISHED["8x7B"], max_position_embeddings=512)
    assert jobs.plan_serve(cluster, model="/m", shape=short).config.get("max_tokens") is None
    with pytest.raises(UsageError, match="context is 512"):
        jobs.plan_serve(cluster, model="/m", shape=short, values={"max_tokens": 600})
