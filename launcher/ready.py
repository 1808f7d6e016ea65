"""From a submitted server to one that answers: its place in the queue, how much is loaded, and then how to ask it.

Leaving early leaves the server alone; a job that ends before it is ready ends with the job's own verdict.
"""

import time
from typing import TYPE_CHECKING

from launcher import runs, screen, servers, waiting, watch

if TYPE_CHECKING:
    from launcher.runs import Run


def wait(run: "Run") -> int:
    """Until `run` is a server that answers; the exit code for the shell. Ctrl-C ends the waiting alone."""
    try:
        if _is_ready(run):
            show(run)
            return 0
    except KeyboardInterrupt:
        screen.say(f"{run.name} goes on; `mixlaunch status` says when it's ready")
        return 130
    return watch.verdict(run)


def show(run: "Run") -> None:
    """Where the server of `run` is and what to type."""
    screen.done(f"{run.job} is ready")
    screen.facts([*servers.how_to_ask(run), ("chat", f"mixlaunch chat {run.name}")])


def _is_ready(run: "Run") -> bool:
    """Watch until the server says so; False when the run ended first."""
    begun = False
    queue = _Queue(run)
    with screen.progress(run.job) as line:
        for event in watch.events(run):
            kind = event.get("event")
            begun = begun or bool(event)
            if kind == "ready":
                return True
            if kind == "progress":
                line.update(f"loading {watch.describe(event)}", event["done"], event["total"])
            elif kind == "exit":
                line.above(watch.describe(event))
            elif not event:
                if not begun and (text := queue.news()):
                    line.above(text)
                line.tick()
    return False


class _Queue:
    """Where a run stands before it says anything itself, each place told once."""

    def __init__(self, run: "Run") -> None:
        self._run, self._asked, self._told = run, time.monotonic(), ""

    def news(self) -> str:
        """What is new; Slurm is asked no more often than is polite."""
        if time.monotonic() - self._asked < watch.ASK_SLURM_EVERY:
            return ""
        self._asked, state = time.monotonic(), runs.state_of(self._run)
        text = state.state.lower()
        if state.state == "PENDING":
            text = f"in the queue: {waiting.find(state.reason).words}" if state.reason else "in the queue"
        elif state.state == "RUNNING":
            text = f"starting on {state.nodes}" if state.nodes else "starting"
        said, self._told = self._told, text
        return text if text != said else ""
