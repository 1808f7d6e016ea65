"""`events.jsonl`: a job's reports for people and programs that watch its run directory.

One JSON object a line. Each is appended with a single write, so readers never see half of it. One rank writes.
"""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from megatron_mixtral.spec import rundir


class EventLog:
    """Appends to `path`; without a path it writes nothing, as on the other ranks."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def write(self, event: rundir.EventKind, **fields: Any) -> None:
        if self._path is None:
            return
        line = json.dumps({"time": round(time.time(), 3), "event": event, **_finite(fields)})
        try:
            with self._path.open("a") as stream:
                stream.write(line + "\n")
        except OSError as error:  # a full disk: files that must be written there report it themselves, on all ranks
            print(f"warning: {self._path}: {error}", file=sys.stderr, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole event in `path`, oldest first; lines that a killed job or a lost node damaged are left out."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_bytes().split(b"\n"):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, dict) and isinstance(found.get("event"), str):
            events.append(found)
    return events


def last_of_each_step(told: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Events of `kind` by step; of a step that was repeated after a restart, the last event counts."""
    steps = {e["step"]: e for e in told if e["event"] == kind and isinstance(e.get("step"), int)}
    return [steps[step] for step in sorted(steps)]


def _finite(fields: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN, so such a number becomes text, and strict readers can parse the line."""
    return {k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
