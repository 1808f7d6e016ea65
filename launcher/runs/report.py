"""A run's report as plain values, for the table of runs, their details and `--json`.

It joins the run's record, its state from the scheduler, the newest events of the job and a server's load.
docs/runs.md documents the keys, which never change.
"""

from collections.abc import Sequence
from typing import Any

from launcher.errors import UsageError
from launcher.host import login_node
from launcher.runs import logs, record, servers, states
from launcher.runs.find import Broken
from launcher.runs.record import Run
from launcher.runs.servers import Load
from launcher.runs.states import State
from launcher.slurm import client, hostlist, reasons

BROKEN = "BROKEN"  # the state of what can't be read
KEYS = (
    "name",
    "job",
    "cluster",
    "path",
    "whose",
    "created",
    "job_id",
    "job_ids",
    "state",
    "active",
    "source",
    "reason",
    "reason_in_words",
    "starts",
    "started",
    "time_left_s",
    "exit_code",
    "nodes",
    "pipeline",
    "attempt",
    "attempts",
    "step",
    "steps",
    "loss",
    "tokens_per_s",
    "validation_loss",
    "checkpoint_step",
    "progress",
    "server",
    "last_event",
)
MOVING = ("time_left_s",)  # changes all the time, which is no news


class Reporter:
    """Reports runs again and again; a server's requests per second are counted between two reports."""

    def __init__(self) -> None:
        self._loads: dict[str, Load] = {}

    def __call__(self, found: Sequence[Run]) -> list[dict[str, Any]]:
        """One report a run, in their order, with one question to each cluster."""
        told = states.of_runs(found)
        return [self._report(record.reread(run), told[run.path]) for run in found]

    def _report(self, run: Run, state: State) -> dict[str, Any]:
        facts = of(run, state)
        if run.job == "serve" and not run.stranger and facts["server"] and state.active and run.host.is_here:
            now = servers.load_of(run)
            facts["server"] |= _server(now, self._loads.get(run.name))
            if now:
                self._loads[run.name] = now
        return facts


def of(run: Run, state: State) -> dict[str, Any]:
    """The report of one run; an unknown value is null."""
    newest = logs.newest(run.path)
    step, attempts = newest.get("step", {}), logs.attempts(run.path)
    pending = state.state == "PENDING"
    return {
        "name": run.name,
        "job": run.job,
        "cluster": run.cluster,
        "path": run.host.shown(run.path),
        "whose": run.stranger or None,
        "created": run.created,
        "job_id": run.job_id,
        "job_ids": run.job_ids,
        "state": state.state,
        "active": state.active,
        "source": state.source,
        "reason": state.reason or None,
        "reason_in_words": reasons.in_words(state.reason) if pending and state.reason else None,
        "starts": (state.start or None) if pending else None,
        "started": None if pending else state.start or None,
        "time_left_s": seconds(state.time_left),
        "exit_code": state.exit_code,
        "nodes": _nodes(state.nodes),
        "pipeline": run.record.get("pipeline"),
        "attempt": attempts[-1] if attempts else None,
        "attempts": len(attempts),
        "step": step.get("step"),
        "steps": step.get("steps"),
        "loss": step.get("loss"),
        "tokens_per_s": step.get("tokens_per_s"),
        "validation_loss": newest.get("eval", {}).get("loss"),
        "checkpoint_step": newest.get("checkpoint", {}).get("step"),
        "progress": _part(newest.get("progress"), ("done", "total", "unit")),
        "server": _part(newest.get("ready") if "exit" not in newest else None, ("url",)),
        "last_event": max((event.get("time", 0) for event in newest.values()), default=None),
    }


def of_broken(found: Broken) -> dict[str, Any]:
    """The report of a folder that can't be read as a run: why, and null."""
    known = {
        "name": found.path.name,
        "path": login_node.of(found.path).shown(found.path),
        "state": BROKEN,
        "active": False,
    }
    return dict.fromkeys(KEYS) | known | {"job_ids": [], "nodes": [], "attempts": 0, "reason": found.why}


def changed(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    """Whether there is something new to report."""
    return before is None or any(before[key] != value for key, value in now.items() if key not in MOVING)


def seconds(text: str) -> int | None:
    """Slurm's remaining time in seconds; None for UNLIMITED and the like."""
    try:
        return client.seconds(text)
    except ValueError:
        return None


def _nodes(text: str) -> list[str]:
    try:
        return hostlist.expand(text)
    except UsageError:
        return [text]


def _part(event: dict[str, Any] | None, keys: tuple[str, ...]) -> dict[str, Any] | None:
    return {key: event.get(key) for key in keys} if event else None


def _server(now: Load | None, before: Load | None) -> dict[str, Any]:
    if now is None:
        return {"answers": False, "requests": None, "requests_per_s": None, "running": None, "queued": None}
    rate = now.rate(before)
    return {
        "answers": True,
        "requests": now.requests,
        "requests_per_s": None if rate is None else round(rate, 3),
        "running": now.running,
        "queued": now.queued,
    }
