"""`status`: what runs are doing, as a table, as the details of some, or as a live table.

The facts of runs come from `runs.report`; here they become words, columns and colours.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from launcher.cli.run_arguments import AS_JSON, IN_CLUSTER, MANY, OTHERS
from launcher.common import printable, terminal, words
from launcher.runs import find, follow, logs, report
from launcher.runs.find import Broken
from launcher.runs.record import Run
from launcher.slurm import hostlist

COLUMNS = (
    *("RUN", "JOB", "CLUSTER", "ID", "STATE", "NODES", "PROGRESS", "LOSS", "TOK/S", "REQ/S", "QUEUE"),
    *("LEFT", "AGE", "NOTE"),
)
WORDS = {"step": "progress", "eval": "validation", "ready": "server"}  # what people call those events
SPARE = ("CLUSTER", "NODES", "JOB", "ID", "AGE")  # columns to drop first on a narrow terminal
RIGHT = ("NODES", "PROGRESS", "LOSS", "TOK/S", "REQ/S", "QUEUE", "LEFT", "AGE")
NEWEST = 20  # runs that are shown
EVERY = 3.0  # seconds between two looks
Find = Callable[[], Sequence[Run]]


@click.command()
@MANY
@click.option("--all", "everything", is_flag=True, help="Show all runs, not only the newest 20.")
@click.option(
    "-w",
    "--watch",
    is_flag=True,
    help="Keep watching. A terminal gets a live table; other output gets a line for each change.",
)
@AS_JSON
@OTHERS
@IN_CLUSTER
def status(
    names: tuple[str, ...], everything: bool, watch: bool, as_json: bool, others: bool, cluster: str | None
) -> None:
    """Show what runs are doing.

    Without RUN it lists all runs, newest first. RUN is a name, a prefix or a job id, and shows the details.
    """
    roots = find.roots_of(cluster)
    unreadable: list[Broken] = []

    def asked() -> Sequence[Run]:
        if names:
            return [find.run(name, roots, others=others) for name in names]
        runs, unreadable[:] = find.look(roots)
        return runs[: None if everything else NEWEST]

    if watch:
        _watch(asked, until_ended=bool(names), as_json=as_json)
        return
    found = asked()
    facts = report.Reporter()(found) + [report.of_broken(one) for one in unreadable]
    if as_json:
        terminal.as_json(facts)
    elif names:
        _details(found, facts)
    else:
        _table(facts, roots)


def _table(facts: Sequence[dict[str, Any]], roots: Sequence[Path]) -> None:
    """One line a run, newest first."""
    if not facts:
        terminal.say(f"no runs yet in {', '.join(map(str, roots))}")
    else:
        terminal.console().print(grid(facts))


def grid(facts: Sequence[dict[str, Any]]) -> Table:
    """The table of runs, not printed yet."""
    return terminal.grid(COLUMNS, [row(run) for run in facts], right=RIGHT, spare=SPARE)


def row(run: dict[str, Any]) -> tuple[str, ...]:
    """A run's line in the table."""
    server = run["server"] or {}
    return (
        run["name"],
        run["job"] or "",
        run["cluster"] or "",
        run["job_id"] or "",
        run["state"],
        str(len(run["nodes"])) if run["nodes"] else "",
        _progress(run),
        _number(run["loss"], ".3f"),
        words.count(run["tokens_per_s"]) if isinstance(run["tokens_per_s"], int | float) else "",
        _number(server.get("requests_per_s"), ".3g"),
        _number(server.get("queued"), "d"),
        "" if run["time_left_s"] is None else words.duration(run["time_left_s"]),
        words.age(run["created"]) if run["created"] else "",
        note(run),
    )


def note(run: dict[str, Any]) -> str:
    """The note in the table: whose it is, why a run waits and until when, or how it ended."""
    if run["whose"] or run["state"] == report.BROKEN:
        return str(run["whose"] or run["reason"])
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
    """A number in that format. `nan` and `inf` come as text and are shown as they are."""
    if isinstance(value, str):
        return value
    return format(value, form) if isinstance(value, int | float) else ""


def _details(found: Sequence[Run], facts: Sequence[dict[str, Any]]) -> None:
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
                ("whose", known["whose"] or ""),
                ("pipeline", place_in_pipeline(known)),
                ("why", note(known) if state == "PENDING" else ""),
                ("reason", "" if state in ("COMPLETED", "PENDING") else known["reason"] or ""),
                ("nodes", hostlist.compress(known["nodes"])),
                ("left", "" if known["time_left_s"] is None else words.duration(known["time_left_s"])),
                *((WORDS.get(kind, kind), text) for kind in newest if (text := follow.describe(newest[kind]))),
                ("requests", load),
                ("attempts", str(len(attempts)) if len(attempts) > 1 else ""),
                ("run", run.host.shown(run.path)),
                ("logs", run.host.shown(logs.path(run.path, attempts[-1]).parent) if attempts else ""),
                ("why it ended", f"mixlaunch explain {run.name}" if ended_badly(known) else ""),
            ]
        )


def ended_badly(run: dict[str, Any]) -> bool:
    """Whether there is something to explain."""
    return not run["whose"] and not run["active"] and run["state"] not in ("COMPLETED", "CANCELLED")


# --- watching ----------------------------------------------------------------------------------------------------


def _watch(find: Find, *, until_ended: bool, as_json: bool) -> None:
    """Show what `find` returns, looked up anew each time, until Ctrl-C or, if asked, until all have ended."""
    with contextlib.suppress(KeyboardInterrupt):
        if terminal.console().is_terminal and not as_json:
            _redraw(find, until_ended)
        else:
            _tell(find, until_ended, _json_line if as_json else _line)


def _redraw(find: Find, until_ended: bool) -> None:
    reporter = report.Reporter()
    # `crop`: rows beyond the terminal's height are cut, because redrawing needs that.
    with Live(console=terminal.console(), auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            facts = reporter(find())
            shown = [grid(facts)] if facts else [Text("no runs yet", style="dim")]
            live.update(Group(Text(_summary(facts), style="dim"), *shown), refresh=True)
            if until_ended and not any(run["active"] for run in facts):
                return
            time.sleep(EVERY)


def _tell(find: Find, until_ended: bool, line: Callable[[dict[str, Any]], str]) -> None:
    reporter = report.Reporter()
    told: dict[str, dict[str, Any]] = {}
    while True:
        facts = reporter(find())
        for run in reversed(facts):
            if report.changed(told.get(run["name"]), run):
                printable.out(line(run))
                told[run["name"]] = run
        if until_ended and not any(run["active"] for run in facts):
            return
        time.sleep(EVERY)


def _summary(facts: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for run in facts:
        counts[run["state"].lower()] = counts.get(run["state"].lower(), 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    return f"{datetime.datetime.now():%H:%M:%S}  {told}  (Ctrl-C ends only the watching)"


def _json_line(run: dict[str, Any]) -> str:
    return printable.as_json(run)


def _line(run: dict[str, Any]) -> str:
    named = dict(zip(COLUMNS, row(run), strict=True))
    parts = [f"{datetime.datetime.now():%H:%M:%S}", named["RUN"], named["STATE"], named["PROGRESS"]]
    labelled = [f"{name.lower()} {named[name]}" for name in ("LOSS", "TOK/S", "REQ/S", "QUEUE") if named[name]]
    return "  ".join(filter(None, [*parts, *labelled, named["NOTE"]]))


COMMANDS = (status,)
