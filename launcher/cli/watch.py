"""From a submission to its end: says what was submitted, shows how far it is, and ends with the job's own verdict.

On a terminal one line moves; elsewhere a line comes now and then, for people and programs that read logs.
"""

import contextlib
import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.common import terminal
from launcher.diagnose import evidence
from launcher.errors import UsageError
from launcher.host import copies
from launcher.host import follow as growth
from launcher.runs import logs, record, servers

if TYPE_CHECKING:
    from launcher.planning.jobs import JobPlan
    from launcher.runs.record import Run

ASK_SLURM_EVERY = 3.0
ASK_HERE_EVERY = 0.5
LAST_LINES = 15
MISTAKE = 2
ALL = "all"


def submit(
    plan: "JobPlan", *, asked: tuple[str, ...], wait: bool | None, follow: bool, tunnel: bool = False
) -> int:
    """Submit, say so, and stay as long as `wait` says; the exit code for the shell.

    True is until the end. None is the job's own way: to the end on this machine; elsewhere until a server is ready,
    and not at all for other jobs. A `tunnel` to a server is held until Ctrl-C.
    """
    if tunnel and plan.profile.is_local:
        raise UsageError("--tunnel: this server will be on this machine already")
    servers.require_port(plan)
    run = record.start(plan, asked=asked)
    where = "this machine" if run.is_local else f"{run.cluster} as job {run.job_id}"
    terminal.done(f"{plan.job} {'started on' if run.is_local else 'submitted to'} {where}")
    facts = [(name, value) for name, value in terminal.plan_facts(plan) if name in ("ranks", "layout", "limit")]
    later = [("follow", f"mixlaunch logs -f {run.name}"), ("cancel", f"mixlaunch cancel {run.name}")]
    until_ready = tunnel or (wait is None and plan.job == "serve" and not run.is_local and not follow)
    to_its_end = follow or (run.is_local if wait is None else wait)
    terminal.facts([*facts, ("run", copies.shown(run.path)), *([] if to_its_end else later)])
    if until_ready:
        from launcher.cli import ready  # which watches with what is here

        return ready.wait(run, tunnel=tunnel)
    return to_the_end(run, follow=follow) if to_its_end else 0


def to_the_end(run: "Run", *, follow: bool) -> int:
    """Watch `run` until it has ended.

    Ctrl-C and SIGTERM end a run on this machine, which outlives its terminal all the same, but only the watching of
    one elsewhere.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if follow:
            _print_log(run)
        else:
            _print_progress(run)
    except KeyboardInterrupt:
        if run.is_local:
            record.cancel(run)
            terminal.say(f"cancelled {run.name}")
        else:
            terminal.say(f"{run.name} goes on; mixlaunch logs -f {run.name}")
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return verdict(run)


def verdict(run: "Run") -> int:
    """Say how `run` ended; 0, 2 for a mistake in what was asked, 1 for anything else."""
    copies.refresh(run.path)
    state = record.state_of(run)
    if state.state == "COMPLETED":
        terminal.done(f"{run.job} done: {copies.shown(run.path)}")
        return 0
    code = state.exit_code
    terminal.failed(f"{run.job} ended as {state.state}{f', exit {code}' if code is not None else ''}")
    log = _blamed(run)
    if log and log.is_file():
        terminal.facts([("log", copies.shown(log))])
        for line in log.read_text(errors="replace").splitlines()[-LAST_LINES:]:
            terminal.say(f"  {line}", "dim")
    return MISTAKE if code == MISTAKE else 1


def _blamed(run: "Run") -> Path | None:
    """The log of the rank that failed first, or the batch script's own when no rank came so far."""
    there = logs.attempts(run.path)
    if not there:
        return None
    first = evidence.first_to_leave(run.path, there[-1])
    return logs.path(run.path, there[-1], first.rank if first else logs.BATCH)


def active(run: "Run") -> Callable[[], bool]:
    """Whether the run still goes on, asking its scheduler no more often than is polite."""
    asked, answer = 0.0, True
    grown = growth.of(run.path)
    every = ASK_HERE_EVERY if run.is_local else ASK_SLURM_EVERY

    def ask() -> bool:
        nonlocal asked, answer
        if grown:
            grown.check()
        if answer and time.monotonic() - asked > every:
            answer, asked = record.state_of(run).active, time.monotonic()
            if grown and not answer:
                grown.settle()
        return answer

    return ask


def _print_log(run: "Run") -> None:
    for line in logs.follow(run.path, active=active(run)):
        print(line, flush=True)


def log_lines(
    run: "Run", *, source: int | str, attempt: int | None, follow: bool, pattern: "re.Pattern[str] | None" = None
) -> Iterator[str]:
    """A log's lines that hold `pattern`, with `follow` as they come; those of all ranks headed by their rank."""
    if source == ALL:
        width = len(str(run.record["nodes"] * run.record["tasks_per_node"] - 1))
        pairs = ((f"[{rank:>{width}}] ", line) for rank, line in _all_lines(run, attempt, follow))
    elif follow:
        pairs = (("", line) for line in logs.follow(run.path, source=source, attempt=attempt, active=active(run)))
    else:
        pairs = (("", line) for line in logs.lines(logs.find(run.path, attempt=attempt, source=source)))
    return (head + line for head, line in pairs if pattern is None or pattern.search(line))


def _all_lines(run: "Run", attempt: int | None, follow: bool) -> Iterator[tuple[int | str, str]]:
    if follow:
        return logs.follow_all(run.path, attempt=attempt, active=active(run))
    logs.find(run.path, attempt=attempt, source=logs.BATCH)
    number = logs.attempts(run.path)[-1] if attempt is None else attempt
    everyone = logs.ranks(run.path, number)
    return ((rank, line) for rank in everyone for line in logs.lines(logs.path(run.path, number, rank)))


def events(run: "Run") -> Iterator[dict[str, Any]]:
    """Events as they are written, with an empty one whenever there is time to look up, until the run has ended."""
    going_on, position, path = active(run), 0, run.path / logs.EVENTS
    while True:
        going = going_on()
        with contextlib.suppress(OSError), path.open("rb") as stream:
            stream.seek(position)
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                with contextlib.suppress(ValueError):
                    yield json.loads(line)
        if not going:
            return
        yield {}
        time.sleep(logs.POLL)


def _print_progress(run: "Run") -> None:
    with terminal.progress(run.job) as line:
        for event in events(run):
            if not event:
                line.tick()
            elif (text := describe(event)) and event["event"] in ("step", "progress"):
                line.update(f"loading {text}" if run.job == "serve" else text, *_fraction(event))
            elif event["event"] == "ready":
                _how_to_ask(run)
            elif text:
                line.above(text)
    line.end()


def _how_to_ask(run: "Run") -> None:
    with contextlib.suppress(UsageError):  # it has gone again
        terminal.facts(servers.how_to_ask(run))


def _fraction(event: dict[str, Any]) -> tuple[float, float]:
    return (event["step"], event["steps"]) if event["event"] == "step" else (event["done"], event["total"])


def describe(event: dict[str, Any]) -> str:
    """One event in a few words; nothing for those that people needn't see."""
    match event:
        case {"event": "step", "step": step, "steps": steps, "loss": float(loss), "tokens_per_s": speed}:
            return f"step {step}/{steps}  loss {loss:.3f}  {terminal.count(speed)} tok/s"
        case {"event": "eval", "step": step, "loss": float(loss)}:
            return f"step {step}: validation loss {loss:.3f}"
        case {"event": "checkpoint", "step": step, "seconds": float(seconds)}:
            return f"step {step}: saved in {seconds:.1f} s"
        case {"event": "progress", "done": done, "total": total, "unit": unit}:
            suffix, left = "B" if unit == "bytes" else f" {unit}", event.get("left")
            rest = f", {left:.0f} s left" if left and done < total else ""
            return f"{terminal.count(done)}{suffix} of {terminal.count(total)}{suffix}{rest}"
        case {"event": "note", "text": str(text)}:
            return text
        case {"event": "unhealthy", "node": node, "reason": reason}:
            return f"{node} isn't fit: {reason}"
        case {"event": "ready", "url": url}:
            return f"ready at {url}"
        case {"event": "exit", "reason": str(reason), "code": int(code)} if code:
            return f"left: {reason}"
    return ""
