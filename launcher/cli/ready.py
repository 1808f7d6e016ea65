"""From a submitted server to one that answers: its place in the queue, how much is loaded, and then how to ask it.

Leaving early leaves the server alone; a job that ends before it is ready ends with the job's own verdict.
"""

import time
from typing import TYPE_CHECKING

from launcher.cli import watch
from launcher.common import terminal
from launcher.runs import record, servers
from launcher.slurm import reasons

POLL = 0.5

if TYPE_CHECKING:
    from launcher.runs.record import Run


def wait(run: "Run", *, tunnel: bool = False) -> int:
    """Until `run` is a server that answers; the exit code for the shell. Ctrl-C ends the waiting alone.

    With `tunnel` a port of this machine leads to it then, until Ctrl-C or its end.
    """
    try:
        if _is_ready(run):
            show(run, tunnel=tunnel)
            return 0
    except KeyboardInterrupt:
        terminal.say(f"{run.name} goes on; `mixlaunch status` says when it's ready")
        return 130
    return watch.verdict(run)


def show(run: "Run", *, tunnel: bool = False) -> None:
    """Where the server of `run` is and what to type."""
    if tunnel:
        _hold(run)
        return
    terminal.done(f"{run.job} is ready")
    terminal.facts([*servers.how_to_ask(run), ("chat", f"mixlaunch chat {run.name}")])


def _hold(run: "Run") -> None:
    """A tunnel that lasts until Ctrl-C or the server's end."""
    from launcher.runs import tunnel

    with tunnel.opened(run) as near:
        terminal.done(f"{run.job} is ready, and here it is {near.url}")
        terminal.facts([*servers.how_to_ask(run, near.url), ("until", "Ctrl-C, which leaves the server alone")])
        goes_on = watch.active(run)
        try:
            while goes_on():
                time.sleep(POLL)
        except KeyboardInterrupt:
            terminal.say(f"{run.name} goes on; the tunnel is closed")


def _is_ready(run: "Run") -> bool:
    """Watch until the server says so; False when the run ended first."""
    begun = False
    queue = _Queue(run)
    with terminal.progress(run.job) as line:
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
        self._asked, state = time.monotonic(), record.state_of(self._run)
        text = state.state.lower()
        if state.state == "PENDING":
            text = f"in the queue: {reasons.find(state.reason).words}" if state.reason else "in the queue"
        elif state.state == "RUNNING":
            text = f"starting on {state.nodes}" if state.nodes else "starting"
        said, self._told = self._told, text
        return text if text != said else ""
