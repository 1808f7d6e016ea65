"""Announces a server's address: `server.json` while it answers, an event, and a command to copy."""

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.spec import rundir

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # addresses that mean all interfaces


def reachable(host: str) -> str:
    """An address of this machine at which a server that listens on `host` answers, as a URL has it."""
    found = ANY.get(host, host)
    return f"[{found}]" if ":" in found else found


@dataclass(frozen=True, kw_only=True)
class Address:
    """A server's address, and the port that was requested."""

    run_dir: Path
    host: str
    port: int
    wanted: int
    key: bool  # whether it requires one

    @property
    def file(self) -> Path:
        return self.run_dir / rundir.SERVER

    def announce(self, log: EventLog, *, model: str, weights: Path) -> None:
        """Write `server.json` and print a command to try; the key isn't printed."""
        host = socket.gethostname() if self.host in ANY else self.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        state = {"host": host, "port": self.port, "url": url, "pid": os.getpid(), "state": "ready", "model": model}
        if self.wanted not in (0, self.port):
            state["taken"] = self.wanted
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps({**state, "weights": str(weights)}) + "\n")
        partial.chmod(0o644)  # whoever may write it is sent the keys of those who ask
        partial.rename(self.file)
        log.write("ready", url=url)
        key = ' -H "Authorization: Bearer $MIXLAUNCH_API_KEY"' if self.key else ""
        body = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 32})
        print(f"ready: {model} at {url}; try")
        print(f"  curl {url}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'", flush=True)

    def remove(self) -> None:
        self.file.unlink(missing_ok=True)
