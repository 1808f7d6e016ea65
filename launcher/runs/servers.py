"""Finds a running server and its key: by address, by its run, or the newest.

A server says where it is in its run's `server.json`, which exists only while it answers, and how busy it is in
`/metrics`.
"""

import json
import os
import re
import shlex
import time
import urllib.parse
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.common import quoting, schema, shared_files
from launcher.errors import Fault, MixlaunchError, UsageError
from launcher.runs import find, record
from megatron_mixtral.spec import rundir

if TYPE_CHECKING:
    import httpx  # takes a tenth of a second to import, and only a question to a server needs it

KEY = "MIXLAUNCH_API_KEY"
PROBE_SECONDS = 2.0
SAYS = {"url": schema.matching(r"https?://[^\s\x00-\x20]{1,2000}")}
MAY_SAY = {
    "host": schema.text,
    "port": schema.whole,
    "model": schema.text,
    "taken": schema.either(schema.whole, schema.text),
}
LINE = re.compile(r"^mixlaunch_(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>[-+.\deE]+)$", re.M)
NOT_WORK = re.compile(r'route="/(?:metrics|health\w*|ready\w*|)"')
ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class Load:
    """One scrape. `requests` counts answers since the start, without those of health checks."""

    at: float
    running: int
    queued: int
    requests: int

    def rate(self, before: "Load | None") -> float | None:
        """Requests a second since `before`."""
        if before is None or self.at <= before.at or self.requests < before.requests:
            return None
        return (self.requests - before.requests) / (self.at - before.at)


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server's address and key."""

    url: str
    key: str | None = None
    name: str = ""  # of the model, where known
    run: record.Run | None = None  # the server's run, where known

    def client(self) -> "httpx.Client":
        """An HTTP client for it; waits for answers as long as they take."""
        import httpx

        if self.key and not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"the key of {self.url} ({KEY}) holds characters that can't be sent")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(10, read=None))


def choose(where: str | None, roots: Iterable[Path]) -> Server:
    """The server that `where` means: host:port, a URL, a run, or None for the newest; `UsageError` when none is."""
    if where is None:
        return newest(roots)
    if where.startswith(("http://", "https://")):
        return Server(url=_checked(where.rstrip("/").removesuffix("/v1")), key=os.environ.get(KEY))
    if ADDRESS.fullmatch(where):
        return Server(url=_checked(f"http://{where}"), key=os.environ.get(KEY))
    return of_run(find.run(where, roots))


def _checked(url: str) -> str:
    """`url` if a server could be there; `UsageError` otherwise."""
    import httpx

    try:
        httpx.URL(url)
        parts = urllib.parse.urlsplit(url)
        if not url.isprintable() or not parts.hostname or parts.port == 0:
            raise ValueError("give a host, and a port from 1 on")
        parts.hostname.encode("idna")  # where names are refused that no resolver takes
    except (ValueError, httpx.InvalidURL) as error:
        raise UsageError(f"{quoting.shown(url)} isn't a server's address: {error}") from None
    return url


def of_run(run: record.Run) -> Server:
    """The server of a run that says it's ready."""
    state = state_of(run)
    key = os.environ.get(KEY) or _key_of(run)
    return Server(url=state["url"], key=key, name=state.get("model", ""), run=run)


def state_of(run: record.Run) -> dict[str, Any]:
    """What a run's server says of itself, asked where it says it; `UsageError` when it says nothing.

    Whoever can write it is sent the key and the conversation.
    """
    record.require_own(run)
    try:
        state: dict[str, Any] = shared_files.parsed(run.host.read_mine(run.path / rundir.SERVER))
        if wrong := schema.misfit(state, SAYS, MAY_SAY):
            raise ValueError(wrong)
        return state
    except FileNotFoundError:
        hint = "it isn't a serve job" if run.job != "serve" else f"see `mixlaunch logs {run.name}`"
        raise UsageError(f"{run.name}: no server is ready there; {hint}") from None
    except (OSError, ValueError) as error:
        raise Fault(f"{run.path / rundir.SERVER}: {error}") from error


def newest(roots: Iterable[Path]) -> Server:
    """The server that was started last; one that was killed left its word behind, so of several one must answer."""
    ready = [run for run in find.every(roots) if not run.stranger and _says(run)]
    if not ready:
        raise UsageError("no server is running; start one with `mixlaunch serve`, or give HOST:PORT")
    first, *others = ready
    server = of_run(first)
    if not others or answers(server):
        return server
    return next((other for other in map(of_run, others) if answers(other)), server)


def _says(run: record.Run) -> bool:
    """Whether a server's word is there that can be believed; behind a login node it is asked for later."""
    if not (run.path / rundir.SERVER).is_file():
        return False
    try:
        shared_files.read_mine(run.path / rundir.SERVER)
    except OSError:
        return False
    return True


def answers(server: Server) -> bool:
    """Whether somebody is there."""
    response = _get(server, "/health")
    return response is not None and response.status_code < 500


def _get(server: Server, route: str) -> "httpx.Response | None":
    """A short question; None when nobody answers."""
    import httpx

    with suppress(httpx.HTTPError), server.client() as client:
        return client.get(route, timeout=PROBE_SECONDS)
    return None


def load_of(run: record.Run) -> Load | None:
    """How busy a run's server is; None when there is none or it doesn't answer. It never raises."""
    with suppress(MixlaunchError):
        response = _get(of_run(run), "/metrics")
        return load(response.text) if response is not None and response.is_success else None
    return None


def load(text: str, at: float | None = None) -> Load:
    """Parse Prometheus text; a missing metric counts as zero."""
    sums = {"requests_running": 0.0, "requests_queued": 0.0, "http_requests_total": 0.0}
    for line in LINE.finditer(text):
        if line["name"] in sums and not NOT_WORK.search(line["labels"] or ""):
            sums[line["name"]] += float(line["value"])
    return Load(
        at=time.time() if at is None else at,
        running=int(sums["requests_running"]),
        queued=int(sums["requests_queued"]),
        requests=int(sums["http_requests_total"]),
    )


def named(server: Server) -> Server:
    """With the name of its model, which servers other than ours must be told; unchanged if it doesn't say."""
    if not server.name and (response := _get(server, "/v1/models")):
        with suppress(ValueError, LookupError, TypeError):
            return replace(server, name=str(response.json()["data"][0]["id"]))
    return server


def how_to_ask(run: record.Run, url: str | None = None) -> list[tuple[str, str]]:
    """What to type to reach the server of `run`, at `url` if there is a tunnel.

    A key is read from its file, so that no screen shows it.
    """
    state = state_of(run)
    taken = f" (port {state['taken']} is taken)" if "taken" in state else ""
    ready = ("ready", f"{state.get('model', '')} at {state['url']}{taken}")
    if url is None and not run.host.is_here:
        return [ready]  # it's the cluster's nodes that reach it there
    body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
    endpoint = f"{url or state['url']}/v1/chat/completions"
    words = ["curl", endpoint, "-H", "Content-Type: application/json", "-d", body]
    key = ""
    if _key_of(run):
        there = ["sed", "-n", f"s/^{KEY}=//p", str(run.host.original(run.path / rundir.SECRETS))]
        key = f' -H "Authorization: Bearer $({run.host.typed(*there)})"'
    return [ready, ("ask", shlex.join(words) + key)]


def _key_of(run: record.Run) -> str | None:
    """From the run's secrets, which only its owner can read."""
    path = run.path / rundir.SECRETS
    try:
        lines = run.host.read_mine(path).decode().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Fault(f"{path}: {error}") from error
    for line in lines:
        name, _, value = line.removeprefix("export ").partition("=")
        if name.strip() == KEY:
            return "".join(shlex.split(value))
    return None


def http_error(response: "httpx.Response") -> str:
    """The message of a server's error, in one line."""
    try:
        body: Any = response.json()
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
