"""What there is, for people: a table of runs, the details of a few, the clusters.

A run joins three sources: its record, its state as the scheduler tells it, and the newest events of the job itself.
"""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import logs, profile, runs, screen, watch
from launcher.errors import MixlaunchError

if TYPE_CHECKING:
    from launcher.runs import Run
    from launcher.states import State

COLUMNS = ("RUN", "JOB", "CLUSTER", "ID", "STATE", "PROGRESS", "LOSS", "TOK/S", "LEFT", "AGE")
WORDS = {"step": "progress", "eval": "validation", "ready": "server"}  # what people call those events
RIGHT = ("PROGRESS", "LOSS", "TOK/S", "LEFT", "AGE")


def table(found: Sequence["Run"], roots: Sequence[Path]) -> None:
    """One line a run, newest first."""
    if not found:
        screen.say(f"no runs yet in {', '.join(map(str, roots))}")
        return
    states = runs.states_of(found)
    screen.table(COLUMNS, [_row(run, states[run.path]) for run in found], right=RIGHT)


def _row(run: "Run", state: "State") -> tuple[str, ...]:
    newest = logs.newest(run.path)
    step = newest.get("step", {})
    return (
        run.name,
        run.job,
        run.cluster,
        run.job_id or "",
        _state(state),
        _progress(newest),
        _number(step.get("loss"), ".3f"),
        screen.count(step["tokens_per_s"]) if isinstance(step.get("tokens_per_s"), int | float) else "",
        state.time_left,
        _age(run.created),
    )


def _state(state: "State") -> str:
    """State with the reason, where waiting has one: `PENDING (Resources)`."""
    return f"{state.state} ({state.reason})" if state.state == "PENDING" and state.reason else state.state


def _progress(newest: dict[str, dict[str, Any]]) -> str:
    if step := newest.get("step"):
        return f"{step.get('step')}/{step.get('steps')}"
    if (copied := newest.get("progress")) and copied.get("total"):
        return f"{copied['done'] / copied['total']:.0%}"
    return "ready" if "ready" in newest and "exit" not in newest else ""


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""


def _age(created: str) -> str:
    seconds = (datetime.datetime.now().astimezone() - datetime.datetime.fromisoformat(created)).total_seconds()
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{max(seconds, 0):.0f}s"


def details(found: Sequence["Run"]) -> None:
    """A few lines a run."""
    states = runs.states_of(found)
    for run in found:
        state, newest = states[run.path], logs.newest(run.path)
        screen.heading(f"{run.name}  {_state(state)}")
        attempts = logs.attempts(run.path)
        pairs = [
            ("job", f"{run.job} on {run.cluster}{f', id {run.job_id}' if run.job_id else ''}"),
            ("reason", "" if state.state == "COMPLETED" else state.reason),
            ("nodes", state.nodes),
            ("starts", state.start if state.state == "PENDING" else ""),
            ("left", state.time_left),
            *((WORDS.get(kind, kind), text) for kind in newest if (text := watch.describe(newest[kind]))),
            ("attempts", str(len(attempts)) if len(attempts) > 1 else ""),
            ("run", str(run.path)),
            ("logs", str(logs.path(run.path, attempts[-1]).parent) if attempts else ""),
        ]
        screen.facts(pairs)


def clusters() -> None:
    """One line a profile; a broken one says what is wrong with it."""
    rows = []
    for name, path in sorted(profile.available().items()):
        try:
            cluster = profile.read(path)
        except MixlaunchError as error:
            rows.append((name, "", "", "", str(error).splitlines()[0]))
            continue
        node = cluster.node
        memory = f" x {node.gpu_memory_gb:g} GB" if node.gpu_memory_gb else ""
        gpus = f"{node.gpus}{memory}" if node.gpus else ""
        default = "*" if name == profile.default() else ""
        rows.append((name + default, cluster.scheduler, gpus, cluster.container.runtime, cluster.description))
    screen.table(("CLUSTER", "SCHEDULER", "GPUS A NODE", "CONTAINER", "DESCRIPTION"), rows)
