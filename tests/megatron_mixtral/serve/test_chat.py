"""`mixlaunch chat`'s client against a real server: one question, a pipe, a conversation, and what goes wrong."""

import io
import json
import os
import subprocess
import sys

import pytest
import small_server

from launcher.cli import chat
from launcher.errors import Fault, UsageError
from launcher.runs import record, servers
from megatron_mixtral.spec import rundir

KEY = "chat-key"
RECORD = {"schema": record.SCHEMA, "job": "serve", "profile": {"name": "local", "scheduler": "local"}, "jobs": []}
RECORD |= {"host": "here", "resumable": True, "cancelled": False}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def running(served_model, root):
    with small_server.server(root / "serve-1", served_model[1], env={"MIXLAUNCH_API_KEY": KEY}) as server:
        make_run(root / "serve-1", "2026-01-02T00:00:00+00:00")
        (root / "serve-1" / "secrets.env").write_text(f"MIXLAUNCH_API_KEY={KEY}\n")
        yield server


def make_run(path, created):
    path.mkdir(exist_ok=True)
    (path / rundir.RECORD).write_text(json.dumps(RECORD | {"name": path.name, "created": created}))


@pytest.fixture
def server(running, root):
    return servers.choose(None, [root])


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    """History goes here."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "mixlaunch"


def typed(monkeypatch, *lines):
    """What `input()` gets, then the end of the file."""
    rest = iter(lines)
    shown = []

    def answer(mark):
        shown.append(mark)
        try:
            line = next(rest)
        except StopIteration:
            raise EOFError from None
        if line == CTRL_C:
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return shown


CTRL_C = "\x03"
SHORT = chat.Settings(max_tokens=6, temperature=0.0)


def test_the_newest_server_is_found_with_its_key(running, root):
    make_run(root / "serve-0", "2025-01-01T00:00:00+00:00")
    make_run(root / "serve-2", "2026-02-01T00:00:00+00:00")  # newer, but not ready
    for where in (None, "serve-1", str(root / "serve-1")):
        found = servers.choose(where, [root])
        assert (found.url, found.key, found.name) == (running.url, KEY, "tiny")


def test_addresses_are_taken_as_they_are(monkeypatch):
    monkeypatch.setenv("MIXLAUNCH_API_KEY", "mine")
    assert servers.choose("node7:5000", []) == servers.Server(url="http://node7:5000", key="mine")
    assert servers.choose("[::1]:80", []).url == "http://[::1]:80"
    assert servers.choose("https://a.example/x/", []).url == "https://a.example/x"
    assert servers.choose("http://a.example/v1", []).url == "http://a.example"  # what OpenAI clients are given


def test_what_is_not_there_is_said(running, root):
    with pytest.raises(UsageError, match="no server is running"):
        servers.choose(None, [root / "nowhere"])
    make_run(root / "serve-0", "2025-01-01T00:00:00+00:00")
    with pytest.raises(UsageError, match="no server is ready"):
        servers.choose("serve-0", [root])


def test_one_question_is_answered_and_streamed(server, capsys):
    chat.run(server, prompt="Hello", system=None, settings=SHORT)
    first = capsys.readouterr().out
    chat.run(server, prompt="Hello", system="You are a pirate.", settings=SHORT)
    assert first.strip()
    assert first != capsys.readouterr().out


def test_a_pipe_is_a_question(server, capsys, monkeypatch):
    chat.run(server, prompt="Hello", system=None, settings=SHORT)
    wanted = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    chat.run(server, prompt=None, system=None, settings=SHORT)
    assert capsys.readouterr().out == wanted
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    with pytest.raises(UsageError, match="empty"):
        chat.run(server, prompt=None, system=None, settings=SHORT)


def test_raw_continues_a_text(server, capsys):
    chat.run(server, prompt="The quick", system=None, settings=SHORT, raw=True)
    whole = server.client().post("/v1/completions", json={"prompt": "The quick", **SHORT.fields()}).json()
    assert capsys.readouterr().out == whole["choices"][0]["text"] + "\n"


def test_a_conversation_remembers_retries_and_saves(server, tmp_path, capsys, monkeypatch):
    saved = tmp_path / "talk.json"
    lines = ["/system Be brief.", "", CTRL_C, "Hello \\", "there", "And now?", "/retry", f"/save {saved}"]
    shown = typed(monkeypatch, *lines, "/nonsense", "/save")
    chat.run(server, prompt=None, system=None, settings=SHORT)
    talk = json.loads(saved.read_text())
    assert [m["role"] for m in talk] == ["system", "user", "assistant", "user", "assistant"]
    assert talk[1]["content"] == "Hello \nthere"
    assert ". " in shown
    output = capsys.readouterr()
    assert "/nonsense isn't a command" in output.err
    assert "/save needs" in output.err
    assert output.out.count(talk[-1]["content"]) == 2  # greedy says the same again
    assert f"saved to {saved}\n" in output.out


def test_all_between_quotes_is_one_question(server, tmp_path, capsys, monkeypatch, state):
    saved = tmp_path / "talk.json"
    typed(monkeypatch, '"""', "One", "", "/retry", '"""', f"/save {saved}", "/new", f"/save {saved}2", "/quit")
    chat.run(server, prompt=None, system=None, settings=SHORT)
    assert json.loads(saved.read_text())[0] == {"role": "user", "content": "One\n\n/retry"}
    assert json.loads((tmp_path / "talk.json2").read_text()) == []
    assert (state / "chat_history").stat().st_mode & 0o777 == 0o600


def test_a_bare_address_says_what_it_serves(server, capsys, monkeypatch):
    typed(monkeypatch, "/quit")
    chat.run(servers.Server(url=server.url, key=KEY), prompt=None, system=None, settings=SHORT)
    assert capsys.readouterr().out.startswith(f"tiny at {server.url};")
    stranger = servers.Server(url=server.url)
    assert servers.named(stranger) == stranger


def test_an_answer_that_is_left_is_remembered_and_cancelled(server, running):
    talk = chat.Conversation(server=server, settings=chat.Settings(max_tokens=200, temperature=0.0))
    answer = talk.ask("Tell me everything")
    piece = next(p for p in answer if p)
    answer.close()
    assert talk.turns[-1]["content"].startswith(piece)

    def load():
        text = server.client().get("/metrics").text
        return float(next(x.split()[-1] for x in text.splitlines() if x.startswith("mixlaunch_requests_running ")))

    running.until(lambda: load() == 0, 1)


def test_refusals_and_absences_are_one_line(server, monkeypatch):
    with pytest.raises(UsageError, match="wants a key"):
        list(chat.Conversation(server=servers.Server(url=server.url)).ask("Hi"))
    with pytest.raises(Fault, match="is the server running"):
        list(chat.Conversation(server=servers.Server(url="http://127.0.0.1:9")).ask("Hi"))
    with pytest.raises(UsageError, match="can't be sent"):
        list(chat.Conversation(server=servers.Server(url=server.url, key="clé")).ask("Hi"))
    with pytest.raises(UsageError, match="isn't text"):
        list(chat.Conversation(server=server).ask(os.fsdecode(b"caf\xe9")))
    talk = chat.Conversation(server=server, settings=chat.Settings(max_tokens=9999))
    with pytest.raises(Fault, match="context is 256"):
        list(talk.ask("Hi"))
    assert talk.turns == []


def test_importing_the_client_takes_no_http_library():
    heavy = ("httpx", "torch", "megatron_mixtral.serve")
    code = f"import sys, launcher.cli.chat; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"
