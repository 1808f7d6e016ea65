"""Find a running server: by address, by its run, or the newest one there is; with the key that opens it.

A server says where it is in its run's `server.json`, which exists only while it answers.
"""

import json
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import mirror, runs
from launcher.errors import Fault, UsageError

if TYPE_CHECKING:
    import httpx

STATE = "server.json"
KEY = "MIXLAUNCH_API_KEY"
ADDRESS = re.compile(r"(?:\[[0-9a-fA-F:]+\]|[\w.-]+):\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class Server:
    """Where to ask, and with what key."""

    url: str
    key: str | None = None
    name: str = ""  # of the model, where known

    def client(self) -> "httpx.Client":
        """An HTTP client for it; waits for answers as long as they take."""
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(10, read=None))


def find(where: str | None, roots: Iterable[Path]) -> Server:
    """The server that `where` means: host:port, a URL, a run, or None for the newest; `UsageError` when none is."""
    if where is None:
        return newest(roots)
    if where.startswith(("http://", "https://")):
        return Server(url=where.rstrip("/"), key=os.environ.get(KEY))
    if ADDRESS.fullmatch(where):
        return Server(url=f"http://{where}", key=os.environ.get(KEY))
    return of_run(runs.find(where, roots))


def of_run(run: runs.Run) -> Server:
    """The server of a run that says it's ready."""
    try:
        state = json.loads((run.path / STATE).read_text())
    except FileNotFoundError:
        hint = "it isn't a serve job" if run.job != "serve" else f"see `mixlaunch logs {run.name}`"
        raise UsageError(f"{run.name}: no server is ready there; {hint}") from None
    except (OSError, ValueError) as error:
        raise Fault(f"{run.path / STATE}: {error}") from error
    return Server(url=state["url"], key=os.environ.get(KEY) or _key_of(run.path), name=state.get("model", ""))


def newest(roots: Iterable[Path]) -> Server:
    """The server that was started last."""
    ready = [run for run in runs.every(roots) if (run.path / STATE).is_file()]
    if not ready:
        raise UsageError("no server is running; start one with `mixlaunch serve`, or give its host:port")
    return of_run(ready[0])


def _key_of(path: Path) -> str | None:
    """From the run's secrets, which only its owner can read."""
    try:
        lines = mirror.read(path / "secrets.env").decode().splitlines()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Fault(f"{path / 'secrets.env'}: {error}") from error
    for line in lines:
        name, _, value = line.removeprefix("export ").partition("=")
        if name.strip() == KEY:
            return "".join(shlex.split(value))
    return None


def explain(response: "httpx.Response") -> str:
    """What a server's refusal says, in one line."""
    try:
        body: Any = response.json()
        return str(body["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {response.reason_phrase}"
