"""What a run is doing or why it ended, where that began, the lines that say so, and what to do.

A healthy run is called healthy, and what no log or scheduler recorded is called unknown.
"""

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.cluster import bad_nodes
from launcher.common import words
from launcher.diagnose import evidence, judge
from launcher.diagnose.causes import table
from launcher.diagnose.causes.cause import RESUME
from launcher.diagnose.evidence import Evidence
from launcher.diagnose.judge import Finding
from launcher.errors import Fault, UsageError
from launcher.host.base import Host
from launcher.runs import follow, logs, record, states
from launcher.runs.record import Run
from launcher.runs.states import State
from launcher.slurm import reasons
from megatron_mixtral.spec import rundir

QUIET = 600  # seconds without output, after which a running job may hang
DOWN = re.compile(r"down|drain|fail|error|unk|boot|powering|maint|[*]", re.I)


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """`verdict`: waiting, running, finished, cancelled, failed or unknown; the finding is of the last attempt."""

    run: Run
    state: State
    verdict: str = "unknown"
    summary: str = ""
    advice: tuple[str, ...] = ()
    finding: Finding | None = None
    earlier: tuple[Finding, ...] = ()

    @property
    def bad_nodes(self) -> dict[str, str]:
        """Nodes that are to blame for the end of an attempt, each with the reason."""
        found = [*self.earlier, *([self.finding] if self.finding else [])]
        return {
            node: f"{finding.cause.title} in {self.run.name}" for finding in found for node in finding.bad_nodes
        }

    @property
    def failed_nodes(self) -> tuple[str, ...]:
        """`bad_nodes`, or if there are none, the node with which the last failure began."""
        last = self.finding.nodes if self.finding and self.finding.cause is not table.CANCELLED else ()
        return tuple(self.bad_nodes) or last


def explain(run: Run, *, attempt: int | None = None) -> Explanation:
    """Explain a run or one attempt; `UsageError` names the attempts if that number doesn't exist."""
    state = states.of_run(run)
    run = record.reread(run)
    there = logs.attempts(run.path)
    if attempt is not None and attempt not in there:
        raise UsageError(f"{run.name} has no attempt {attempt}; there are: {', '.join(map(str, there)) or 'none'}")
    blank = Explanation(run=run, state=state)
    if attempt is not None:
        return _of_attempt(blank, _evidence(run, attempt, state, there), newest=attempt == there[-1])
    attempts = (_evidence(run, number, state, there) for number in there)
    findings = [_finding(run, left) for left in attempts if not _goes_on(left, state, left.attempt == there[-1])]
    blank = replace(blank, earlier=tuple(found for found in findings if found))
    if state.active:
        return _of_active(blank)
    if state.state == "COMPLETED":
        return replace(blank, verdict="finished", summary=_finished(run))
    last = findings[-1] if there else judge.judge(evidence.of_attempt(run, None, state))
    return _of_ended(replace(blank, earlier=tuple(found for found in blank.earlier if found is not last)), last)


def _evidence(run: Run, number: int, state: State, there: Sequence[int]) -> Evidence:
    last = number == there[-1] and not state.active
    return evidence.of_attempt(run, number, state if last else None)


def _finding(run: Run, left: Evidence) -> Finding | None:
    return _with_slurms_word(run, judge.judge(left), left.nodes)


def _goes_on(left: Evidence, state: State, newest: bool) -> bool:
    """Whether an attempt is under way. An active job may be between two attempts."""
    return state.active and newest and not left.last_word


def _of_attempt(blank: Explanation, left: Evidence, *, newest: bool) -> Explanation:
    if _goes_on(left, blank.state, newest):
        return _of_active(blank)
    if found := _finding(blank.run, left):
        return _of_ended(blank, found)
    return replace(blank, verdict="finished", summary=f"attempt {left.attempt} did its work")


def _of_ended(blank: Explanation, found: Finding | None) -> Explanation:
    run, state = blank.run, blank.state
    if found is None:  # the logs report success and Slurm doesn't: the job was ended in its last moments
        return replace(blank, summary=f"Slurm says {state.state}, and its own log says that it was done")
    verdict = "cancelled" if found.cause is table.CANCELLED else "failed"
    advice = tuple(_addressed(run, found.cause.advice, again=state.resumable))
    return replace(blank, verdict=verdict, summary=_sentence(run, found), advice=advice, finding=found)


def _of_active(blank: Explanation) -> Explanation:
    run, state = blank.run, blank.state
    if state.state == "PENDING":
        reason = reasons.find(state.reason)
        starts = f"; Slurm expects it to start about {words.moment(state.start)}" if state.start else ""
        summary = f"it hasn't started: {reason.words} ({state.reason or 'no reason given'}){starts}"
        advice = tuple(_addressed(run, [reason.advice] if reason.advice else []))
        return replace(blank, verdict="waiting", summary=summary, advice=advice)
    if state.state in ("UNKNOWN", states.SUBMITTING):
        return replace(blank, summary=state.reason)
    summary, quiet = _progress(run)
    advice = (f"`mixlaunch logs {run.name} --rank all` shows what each rank said last",) if quiet else ()
    return replace(blank, verdict="running", summary=summary, advice=advice)


def _progress(run: Run) -> tuple[str, bool]:
    """The progress of a running job, and whether it has printed nothing for suspiciously long."""
    newest = logs.newest(run.path)
    said = [
        text for kind in ("step", "progress", "ready") if (text := follow.describe(newest.get(kind, {"event": ""})))
    ]
    spoke = max((path.stat().st_mtime for path in _written(run)), default=None)
    silence = time.time() - spoke if spoke else 0
    what = f"it runs: {said[0]}" if said else "it runs, and hasn't reported progress yet"
    if silence > QUIET and "ready" not in newest:
        return f"{what}; nothing was written for {words.duration(silence)}; it may hang", True
    return f"{what}; no sign of trouble", False


def _written(run: Run) -> Iterable[Path]:
    there = logs.attempts(run.path)
    newest = logs.path(run.path, there[-1], logs.BATCH).parent.glob("*.log") if there else []
    return [path for path in (*newest, run.path / rundir.EVENTS) if path.exists()]


def _finished(run: Run) -> str:
    step = logs.newest(run.path).get("step")
    return f"it finished: {step['step']} of {step.get('steps')} steps" if step else "it finished"


def _with_slurms_word(run: Run, found: Finding | None, nodes: Sequence[str]) -> Finding | None:
    """If no log names the node that failed: those `nodes` of the job that Slurm calls down now."""
    if found is None or found.cause.name != "node_failure" or found.nodes or run.is_local or run.stranger:
        return found
    down = _down(nodes, run.host)
    return replace(found, nodes=tuple(down), notes=(*found.notes, *down.values()))


def _down(nodes: Sequence[str], host: Host) -> dict[str, str]:
    if not nodes:
        return {}
    arguments = ("--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E")
    try:
        answer = host.call("sinfo", *arguments)
    except Fault:
        return {}
    found = {}
    for line in answer.splitlines():
        node, state, why = (*line.split("|", 2), "", "")[:3]
        if node in nodes and DOWN.search(state):
            found[node] = f"{node} is {state} now{f': {why}' if why not in ('none', '') else ''}"
    return found


def failed_nodes(run: Run) -> tuple[str, ...]:
    """The nodes on which a run failed; `UsageError` if no log names one."""
    explanation = explain(run)
    if not explanation.failed_nodes:
        raise UsageError(
            f"--exclude-failed: nothing names a node of {run.name} ({explanation.summary}); give --exclude NODES"
        )
    return explanation.failed_nodes


def mark_bad(explanation: Explanation, lasting: str) -> None:
    """Put the bad nodes on their cluster's list; `UsageError` if there are none."""
    record.require_own(explanation.run)  # whose profile says where the list is
    until = bad_nodes.duration(lasting)
    if not explanation.bad_nodes:
        raise UsageError(
            f"{explanation.run.name}: nothing in it speaks against a node ({explanation.summary}); "
            "`mixlaunch nodes add NODE --reason TEXT` marks a node anyway"
        )
    bad_nodes.add(explanation.run.profile, explanation.bad_nodes, until)


# --- in words ----------------------------------------------------------------------------------------------------


def _sentence(run: Run, found: Finding) -> str:
    many = len(logs.attempts(run.path)) > 1
    return f"{found.brief}{f', in attempt {found.attempt}' if many else ''}"


def _addressed(run: Run, advice: Iterable[str], *, again: bool = True) -> Iterable[str]:
    """Advice with the run's name for RUN and its job for ID, without what can't be done for this run."""
    for text in advice:
        if not again and re.search(r"mixlaunch (?:resume|retry)", text):
            continue
        if run.is_local and re.search(r"--mark-bad|--exclude-failed|sacct|sinfo|scontrol", text):
            continue
        if not run.record["resumable"]:
            text = text.replace(RESUME, "`mixlaunch retry RUN` runs it again").replace("resume RUN", "retry RUN")
        yield re.sub(r"\bID\b", run.job_id or "ID", re.sub(r"\bRUN\b", run.name, text))
