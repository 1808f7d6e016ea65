"""What there is, for people: a table of runs, the details of a few.

The facts of runs come from `report`; here they become words, columns and colours.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.common import terminal, words
from launcher.host import copies
from launcher.runs import follow, logs
from launcher.slurm import hostlist

if TYPE_CHECKING:
    from rich.table import Table

    from launcher.runs.record import Run

COLUMNS = (
    *("RUN", "JOB", "CLUSTER", "ID", "STATE", "NODES", "PROGRESS", "LOSS", "TOK/S", "REQ/S", "QUEUE"),
    *("LEFT", "AGE", "NOTE"),
)
WORDS = {"step": "progress", "eval": "validation", "ready": "server"}  # what people call those events
SPARE = ("CLUSTER", "NODES", "JOB", "ID", "AGE")  # the first to go where the terminal is narrow
RIGHT = ("NODES", "PROGRESS", "LOSS", "TOK/S", "REQ/S", "QUEUE", "LEFT", "AGE")


def table(facts: Sequence[dict[str, Any]], roots: Sequence[Path]) -> None:
    """One line a run, newest first."""
    if not facts:
        terminal.say(f"no runs yet in {', '.join(map(str, roots))}")
    else:
        terminal.console().print(grid(facts))


def grid(facts: Sequence[dict[str, Any]]) -> "Table":
    """The table of runs, not printed yet."""
    return terminal.grid(COLUMNS, [row(run) for run in facts], right=RIGHT, spare=SPARE)


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """A run's line in the table."""
    server = run["server"] or {}
    return (
        run["name"],
        run["job"],
        run["cluster"],
        run["job_id"] or "",
        run["state"],
        str(len(run["nodes"])) if run["nodes"] else "",
        _progress(run),
        _number(run["loss"], ".3f"),
        words.count(run["tokens_per_s"]) if isinstance(run["tokens_per_s"], int | float) else "",
        _number(server.get("requests_per_s"), ".3g"),
        _number(server.get("queued"), "d"),
        "" if run["time_left_s"] is None else words.duration(run["time_left_s"]),
        words.age(run["created"]),
        note(run),
    )


def note(run: dict[str, Any]) -> str:
    """What else one wants to know at a glance: why it waits and until when, how it ended."""
    if run["state"] == "PENDING":
        starts = f"starts about {words.moment(run['starts'])}" if run["starts"] else ""
        waits = place_in_pipeline(run) if run["reason"] == "Dependency" else ""
        return "; ".join(filter(None, [waits or run["reason_in_words"], starts]))
    if run["server"] and run["server"].get("answers") is False:
        return "its server doesn't answer"
    if not run["active"] and run["exit_code"]:
        return words.code_in_words(run["exit_code"])
    return run["reason"] or "" if run["source"] == "logs" and run["state"] != "COMPLETED" else ""


def place_in_pipeline(run: dict[str, Any]) -> str:
    """`step 3 of 4, after convert-...`."""
    link = run["pipeline"]
    if not link:
        return ""
    after = f", after {' and '.join(link['after'])}" if link["after"] else ""
    return f"step {link['step']} of {link['steps']}{after}"


def _progress(run: dict[str, Any]) -> str:
    if run["step"] is not None:
        return f"{run['step']}/{run['steps']}"
    copied = run["progress"]
    if run["server"]:
        return "ready"
    return f"{copied['done'] / copied['total']:.0%}" if copied and copied["total"] else ""


def _number(value: Any, form: str) -> str:
    """A number in its form; what isn't finite arrives as text and stays so."""
    if isinstance(value, str):
        return value
    return format(value, form) if isinstance(value, int | float) else ""


def details(found: "Sequence[Run]", facts: Sequence[dict[str, Any]]) -> None:
    """A few lines a run."""
    for run, known in zip(found, facts, strict=True):
        newest = logs.newest(run.path)
        attempts = logs.attempts(run.path)
        server = known["server"] or {}
        load = f"{server['running']} running, {server['queued']} queued" if server.get("answers") else ""
        state = known["state"]
        terminal.heading_with_state(run.name, state)
        terminal.facts(
            [
                ("job", f"{run.job} on {run.cluster}{f', id {run.job_id}' if run.job_id else ''}"),
                ("pipeline", place_in_pipeline(known)),
                ("why", note(known) if state == "PENDING" else ""),
                ("reason", "" if state in ("COMPLETED", "PENDING") else known["reason"] or ""),
                ("nodes", hostlist.compress(known["nodes"])),
                ("left", "" if known["time_left_s"] is None else words.duration(known["time_left_s"])),
                *((WORDS.get(kind, kind), text) for kind in newest if (text := follow.describe(newest[kind]))),
                ("requests", load),
                ("attempts", str(len(attempts)) if len(attempts) > 1 else ""),
                ("run", copies.shown(run.path)),
                ("logs", copies.shown(logs.path(run.path, attempts[-1]).parent) if attempts else ""),
                ("why it ended", f"mixlaunch explain {run.name}" if ended_badly(known) else ""),
            ]
        )


def ended_badly(run: dict[str, Any]) -> bool:
    """Whether there is something to explain."""
    return not run["active"] and run["state"] not in ("COMPLETED", "CANCELLED")
