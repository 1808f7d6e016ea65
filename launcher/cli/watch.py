"""A run from its submission to its end: how far it is, and then the job's own verdict.

A terminal gets one live line, and other output a line now and then. A server is watched until it answers; ending
the watching doesn't end the server.
"""

import contextlib
import signal
import time
from pathlib import Path
from typing import Any

from launcher.common import printable, shared_files, terminal
from launcher.errors import UsageError
from launcher.runs import follow as going_on
from launcher.runs import logs, servers, states, tunnel
from launcher.runs.record import Run
from launcher.slurm import reasons

LAST_LINES = 15
END = 65_536  # bytes of a log that hold them
MISTAKE = 2
POLL = 0.5


def to_the_end(run: Run, *, follow: bool) -> int:
    """Watch `run` until it has ended.

    Ctrl-C and SIGTERM cancel a run on this machine, though it would outlive its terminal. For a run on a cluster
    they end only the watching.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if follow:
            _print_log(run)
        else:
            _print_progress(run)
    except KeyboardInterrupt:
        if run.is_local:
            states.cancel(run)
            terminal.say(f"cancelled {run.name}")
        else:
            terminal.say(f"{run.name} continues; mixlaunch logs -f {run.name}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return verdict(run)


def verdict(run: Run) -> int:
    """Print how `run` ended; returns 0, 2 for a user's mistake, or 1 for anything else."""
    run.host.refresh(run.path)
    state = states.of_run(run)
    if state.state == "COMPLETED":
        terminal.done(f"{run.job} done: {run.host.shown(run.path)}")
        return 0
    code = state.exit_code
    terminal.failed(f"{run.job} ended as {state.state}{f', exit {code}' if code is not None else ''}")
    log = _blamed(run)
    if log and log.is_file():
        terminal.facts([("log", run.host.shown(log))])
        for line in shared_files.tail(log, END).decode(errors="replace").splitlines()[-LAST_LINES:]:
            terminal.say(f"  {line}", "dim")
    return MISTAKE if code == MISTAKE else 1


def _blamed(run: Run) -> Path | None:
    """The log of the rank that failed first, or the batch script's log if no rank started."""
    there = logs.attempts(run.path)
    if not there:
        return None
    first = logs.first_to_leave(run.path, there[-1])
    return logs.path(run.path, there[-1], first.rank if first else logs.BATCH)


def _print_log(run: Run) -> None:
    for line in logs.follow(run.path, active=going_on.active(run)):
        printable.out(line)


def _print_progress(run: Run) -> None:
    with terminal.progress(run.job) as line:
        for event in going_on.events(run):
            if not event:
                line.tick()
            elif (text := going_on.describe(event)) and event["event"] in ("step", "progress"):
                line.update(f"loading {text}" if run.job == "serve" else text, *_fraction(event))
            elif event["event"] == "ready":
                _how_to_ask(run)
            elif text:
                line.above(text)
    line.end()


def _how_to_ask(run: Run) -> None:
    with contextlib.suppress(UsageError):  # the server has gone again
        terminal.facts(servers.how_to_ask(run))


def _fraction(event: dict[str, Any]) -> tuple[float, float]:
    return (event["step"], event["steps"]) if event["event"] == "step" else (event["done"], event["total"])


# --- until a server answers --------------------------------------------------------------------------------------


def to_ready(run: Run, *, through_tunnel: bool = False) -> int:
    """Watch until `run` is a server that answers; the exit code for the shell. Ctrl-C ends only the waiting.

    With a tunnel, a port of this machine then leads to the server until Ctrl-C or the server's end.
    """
    try:
        if _is_ready(run):
            _show_server(run, through_tunnel)
            return 0
    except KeyboardInterrupt:
        terminal.say(f"{run.name} continues; `mixlaunch status` says when it is ready")
        return 130
    return verdict(run)


def _show_server(run: Run, through_tunnel: bool) -> None:
    """Print the address of `run`'s server, and commands to try."""
    if through_tunnel:
        _hold(run)
        return
    terminal.done(f"{run.job} is ready")
    terminal.facts([*servers.how_to_ask(run), ("chat", f"mixlaunch chat {run.name}")])


def _hold(run: Run) -> None:
    """Hold a tunnel until Ctrl-C or the server's end."""
    with tunnel.opened(run) as near:
        terminal.done(f"{run.job} is ready; on this machine it is {near.url}")
        terminal.facts([*servers.how_to_ask(run, near.url), ("until", "Ctrl-C (the server continues)")])
        active = going_on.active(run)
        try:
            while active():
                time.sleep(POLL)
        except KeyboardInterrupt:
            terminal.say(f"{run.name} continues; the tunnel is closed")


def _is_ready(run: Run) -> bool:
    """Watch until the server is ready; False if the run ends first."""
    begun = False
    queue = _Queue(run)
    with terminal.progress(run.job) as line:
        for event in going_on.events(run):
            kind = event.get("event")
            begun = begun or bool(event)
            if kind == "ready":
                return True
            if kind == "progress":
                line.update(f"loading {going_on.describe(event)}", event["done"], event["total"])
            elif kind == "exit":
                line.above(going_on.describe(event))
            elif not event:
                if not begun and (text := queue.news()):
                    line.above(text)
                line.tick()
    return False


class _Queue:
    """Reports a run's state until the run reports something itself: in the queue, or starting. Each is printed
    once.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._asked, self._told = run, time.monotonic(), ""

    def news(self) -> str:
        """What is new since the last call. Slurm is asked every few seconds at most."""
        if time.monotonic() - self._asked < going_on.ASK_SLURM_EVERY:
            return ""
        self._asked, state = time.monotonic(), states.of_run(self._run)
        text = state.state.lower()
        if state.state == "PENDING":
            text = f"in the queue: {reasons.in_words(state.reason)}" if state.reason else "in the queue"
        elif state.state == "RUNNING":
            text = f"starting on {state.nodes}" if state.nodes else "starting"
        said, self._told = self._told, text
        return text if text != said else ""
