"""`status --watch`: the table of runs, redrawn in place on a terminal; elsewhere a line whenever a run has news.

Watching named runs ends when all of them have ended; watching everything ends with Ctrl-C, which is no error.
"""

import contextlib
import datetime
import json
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from launcher.cli import status
from launcher.common import terminal
from launcher.runs import report

if TYPE_CHECKING:
    from launcher.runs.record import Run

EVERY = 3.0
Find = Callable[[], "Sequence[Run]"]


def watch(find: Find, *, until_ended: bool, as_json: bool) -> None:
    """Show what `find` returns, looked up anew each time, until Ctrl-C or, if asked, until all have ended."""
    with contextlib.suppress(KeyboardInterrupt):
        if terminal.console().is_terminal and not as_json:
            _redraw(find, until_ended)
        else:
            _tell(find, until_ended, _json_line if as_json else _line)


def _redraw(find: Find, until_ended: bool) -> None:
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    reporter = report.Reporter()
    # `crop`: what doesn't fit the terminal's height is left out, as redrawing in place needs.
    with Live(console=terminal.console(), auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            facts = reporter(find())
            shown = [status.grid(facts)] if facts else [Text("no runs yet", style="dim")]
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
                print(line(run), flush=True)
                told[run["name"]] = run
        if until_ended and not any(run["active"] for run in facts):
            return
        time.sleep(EVERY)


def _summary(facts: Sequence[dict[str, Any]]) -> str:
    counts: dict[str, int] = {}
    for run in facts:
        counts[run["state"].lower()] = counts.get(run["state"].lower(), 0) + 1
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    return f"{datetime.datetime.now():%H:%M:%S}  {told}  (Ctrl-C ends the watching, not the runs)"


def _json_line(run: dict[str, Any]) -> str:
    return json.dumps(run, ensure_ascii=False)


def _line(run: dict[str, Any]) -> str:
    named = dict(zip(status.COLUMNS, status.row(run), strict=True))
    parts = [f"{datetime.datetime.now():%H:%M:%S}", named["RUN"], named["STATE"], named["PROGRESS"]]
    labelled = [f"{name.lower()} {named[name]}" for name in ("LOSS", "TOK/S", "REQ/S", "QUEUE") if named[name]]
    return "  ".join(filter(None, [*parts, *labelled, named["NOTE"]]))
