"""`chat`: one question, piped input, or a conversation with a server, streamed to the terminal.

In a conversation a backslash at the end of a line continues it, and lines between two lines of three quotes are one
question. Lines that begin with a slash are commands.
"""

import atexit
import io
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from launcher.common import printable, state_dir
from launcher.errors import Fault, UsageError
from launcher.runs import find, servers, tunnel
from launcher.runs.servers import Server

HISTORY = 1000  # lines that the arrow keys bring back, also from earlier conversations
QUOTES = '"""'
HELP = """\
/system TEXT   set the system prompt; without TEXT, remove it
/retry         ask the last question again
/save FILE     write the conversation as JSON
/new           begin again
/quit          or Ctrl-D; Ctrl-C stops an answer, or drops a line
A line that ends in \\ goes on in the next one; so does all between two lines of three quotes."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to answer; None leaves it to the server."""

    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not math.isfinite(self.temperature):
            raise UsageError(f"--temperature: {self.temperature} isn't a number to sample with")

    def fields(self) -> dict[str, Any]:
        named = {"max_tokens": self.max_tokens, "temperature": self.temperature, "seed": self.seed}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(kw_only=True)
class Conversation:
    """What was said so far."""

    server: Server
    settings: Settings = field(default_factory=Settings)
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def ask(self, question: str) -> Iterator[str]:
        """The answer's pieces. An answer that is broken off is remembered as far as it came."""
        self.turns.append({"role": "user", "content": question})
        said: list[str] = []
        try:
            for piece in _stream(self.server, "/v1/chat/completions", self._body()):
                text = piece["delta"].get("content") or ""
                said.append(text)
                yield text
        finally:
            if answer := "".join(said):
                self.turns.append({"role": "assistant", "content": answer})
            else:
                self.turns.pop()  # two questions in a row aren't a valid conversation

    def retry(self) -> Iterator[str]:
        """Ask the last question again."""
        if not self.turns:
            raise UsageError("there is no question to ask again")
        question = self.turns[-2]["content"]
        del self.turns[-2:]
        return self.ask(question)

    def save(self, path: Path) -> None:
        try:
            path.write_text(json.dumps(self.messages(), ensure_ascii=False, indent=2) + "\n")
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}") from error

    def _body(self) -> dict[str, Any]:
        return {**_model(self.server), "messages": self.messages(), **self.settings.fields()}


def complete(server: Server, text: str, settings: Settings) -> Iterator[str]:
    """The pieces that continue `text`, for a base model that was never taught to chat."""
    body = {**_model(server), "prompt": text, **settings.fields()}
    for piece in _stream(server, "/v1/completions", body):
        yield piece["text"]


def _model(server: Server) -> dict[str, str]:
    """The model's name, where it is known. Our server has one model; other servers must be told which."""
    return {"model": server.name} if server.name else {}


def run(server: Server, *, prompt: str | None, system: str | None, settings: Settings, raw: bool = False) -> None:
    """One answer to `prompt` or to piped input; a conversation on a terminal.

    `raw` continues the text instead of answering it.
    """
    _tolerate_any_bytes()
    if prompt is None and (sys.stdin is None or not sys.stdin.isatty()):
        prompt = sys.stdin.read().strip() if sys.stdin else ""
    if prompt is not None and not prompt:
        raise UsageError("the prompt is empty")
    server = servers.named(server)
    conversation = Conversation(server=server, settings=settings, system=system)
    if prompt is not None:
        _print(complete(server, prompt, settings) if raw else conversation.ask(prompt))
    elif raw:
        raise UsageError("--raw continues a text: give the text with -p or through a pipe")
    else:
        _converse(conversation)


def _tolerate_any_bytes() -> None:
    """Keep what is typed though it may be no text, and replace what the terminal can't show."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _converse(conversation: Conversation) -> None:
    _line_editing()
    printable.out(f"{conversation.server.name or 'model'} at {conversation.server.url}; /help lists the commands")
    while True:
        try:
            line = _read()
        except KeyboardInterrupt:  # Ctrl-C drops the line, as in a shell
            printable.out()
            continue
        except EOFError:
            printable.out()
            return
        if line in ("/quit", "/exit"):
            return
        try:
            _obey(conversation, line) if line.startswith("/") else _print(conversation.ask(line))
        except (UsageError, Fault) as error:
            printable.out(f"error: {error}", err=True)


def _line_editing() -> None:
    """Arrow keys edit a line and bring back earlier ones, from a file that only the user can read."""
    try:
        import readline
    except ImportError:
        return
    path = state_dir.state() / "chat_history"

    def keep() -> None:
        with suppress(OSError):
            readline.write_history_file(path)

    with suppress(OSError):
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        readline.set_history_length(HISTORY)
        atexit.register(keep)
        readline.read_history_file(path)


def _read() -> str:
    """One question: a line, or several joined by backslashes or quotes; empty lines are skipped."""
    while True:
        lines = [input("> ")]
        if lines[0].strip() == QUOTES:
            lines = list(iter(lambda: input(". "), QUOTES))
        while lines and lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(". "))
        if question := "\n".join(lines).strip():
            return question


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/system":
        conversation.system = argument.strip() or None
        printable.out("system prompt set" if conversation.system else "no system prompt")
    elif command == "/retry":
        _print(conversation.retry())
    elif command == "/save":
        if not argument.strip():
            raise UsageError("/save needs a file's name")
        conversation.save(path := Path(os.path.expanduser(argument.strip())))
        printable.out(f"saved to {path}")
    elif command == "/new":
        conversation.turns.clear()
        printable.out("a new conversation")
    elif command == "/help":
        printable.out(HELP)
    else:
        raise UsageError(f"{command} isn't a command; /help lists them")


def _print(pieces: Iterator[str]) -> None:
    """Print pieces as they come. Ctrl-C ends the answer, and the server stops generating."""
    try:
        for piece in pieces:
            printable.out(piece, end="")
    except KeyboardInterrupt:
        pieces.close()  # type: ignore[attr-defined]
    finally:
        printable.out()


def _stream(server: Server, route: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The first choice of each chunk of the answer."""
    import httpx  # only now: it takes a tenth of a second

    try:
        with server.client() as client, client.stream("POST", route, json={**body, "stream": True}) as response:
            if response.status_code != httpx.codes.OK:
                response.read()
                raise _refusal(server, response)
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise Fault(f"{server.url}: {chunk['error']['message']}")
                yield from chunk["choices"][:1]
    except UnicodeEncodeError as error:
        raise UsageError("what was asked isn't text in this terminal's encoding") from error
    except httpx.HTTPError as error:
        raise Fault(f"{server.url}: {error or type(error).__name__}; is the server running?") from error


def _refusal(server: Server, response: Any) -> UsageError | Fault:
    if response.status_code == 401:
        return UsageError(f"{server.url} wants a key: set {servers.KEY}, or name the server's run")
    return Fault(f"{server.url}: {servers.http_error(response)}")


@click.command()
@click.argument("server", required=False)
@click.option(
    "-p", "--prompt", help="Ask this, print the answer, and end.  [default: a conversation, or piped input]"
)
@click.option("--system", help="The system prompt.")
@click.option("--raw", is_flag=True, help="Continue the text instead of answering it.")
@click.option("--max-tokens", type=click.IntRange(1), metavar="N", help="Longest answer.")
@click.option(
    "--temperature", type=click.FloatRange(0), metavar="X", help="0 always takes the most probable token."
)
@click.option("--seed", type=int, metavar="N", help="Makes a sampled answer repeatable.")
def chat(server: str | None, prompt: str | None, system: str | None, raw: bool, **how: Any) -> None:
    """Talk to a server.

    SERVER is HOST:PORT, a URL or the name of the server's run. The default is the newest server.
    """
    with tunnel.if_needed(servers.choose(server, find.roots_of(None))) as found:
        run(found, prompt=prompt, system=system, raw=raw, settings=Settings(**how))


COMMANDS = (chat,)
