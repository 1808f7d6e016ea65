"""How busy a server is, from its `/metrics`: requests that run and wait, and how many were answered.

A scrape is short and never raises: a server that doesn't answer is a fact, not an error.
"""

import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.errors import MixlaunchError

if TYPE_CHECKING:
    from launcher.runs.record import Run

TIMEOUT = 2.0
LINE = re.compile(r"^mixlaunch_(?P<name>\w+)(?:\{(?P<labels>[^}]*)\})? (?P<value>[-+.\deE]+)$", re.M)
NOT_WORK = re.compile(r'route="/(?:metrics|health\w*|ready\w*|)"')


@dataclass(frozen=True, kw_only=True)
class Load:
    """One scrape. `requests` counts answers since the start, questions about its health left out."""

    at: float
    running: int
    queued: int
    requests: int

    def rate(self, before: "Load | None") -> float | None:
        """Requests a second since `before`."""
        if before is None or self.at <= before.at or self.requests < before.requests:
            return None
        return (self.requests - before.requests) / (self.at - before.at)


def of_run(run: "Run") -> Load | None:
    """The load of a run's server; None when there is none or it doesn't answer."""
    import httpx

    from launcher.runs import servers

    try:
        with servers.of_run(run).client() as client:
            answer = client.get("/metrics", timeout=TIMEOUT)
        answer.raise_for_status()
    except (MixlaunchError, httpx.HTTPError):
        return None
    return read(answer.text)


def read(text: str, at: float | None = None) -> Load:
    """Parse Prometheus text; what isn't there counts as nothing."""
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
