"""`explain`: why a run ended or what it is doing, printed for people and for programs."""

from collections.abc import Sequence
from typing import Any

import click

from launcher.cli.run_arguments import AS_JSON, IN_CLUSTER, NEWEST, OTHERS
from launcher.common import printable, terminal, words
from launcher.diagnose import explain as diagnosis
from launcher.diagnose.explain import Explanation
from launcher.diagnose.judge import Finding
from launcher.host.base import Host
from launcher.runs import find
from launcher.slurm import hostlist


@click.command()
@NEWEST
@click.option("--attempt", type=int, metavar="N", help="Attempt to explain.  [default: the last one]")
@click.option("--mark-bad", is_flag=True, help="Put the nodes that failed on the cluster's list of bad nodes.")
@click.option(
    "--for",
    "lasting",
    default="7d",
    metavar="12h|7d|2w|forever",
    help="How long they stay on the list.  [default: 7d]",
)
@AS_JSON
@OTHERS
@IN_CLUSTER
def explain(
    name: str, attempt: int | None, mark_bad: bool, lasting: str, as_json: bool, others: bool, cluster: str | None
) -> None:
    """Say why a run ended, or what it is doing.

    It shows the first rank and node that failed, the cause, the lines that show it, and what to do. RUN is a name,
    a prefix or a job id. The default is the newest run.
    """
    explanation = diagnosis.explain(find.run(name, find.roots_of(cluster), others=others), attempt=attempt)
    if mark_bad:
        diagnosis.mark_bad(explanation, lasting)
        printable.out(f"jobs on {explanation.run.cluster} keep off {', '.join(explanation.bad_nodes)}", err=True)
    if as_json:
        terminal.as_json(as_dict(explanation))
    else:
        _show(explanation)


def _show(explanation: Explanation) -> None:
    """For people."""
    terminal.heading_with_state(explanation.run.name, explanation.state.state)
    marks = {"failed": terminal.failed, "finished": terminal.done}
    marks.get(explanation.verdict, terminal.say)(explanation.summary)
    if explanation.finding:
        _show_finding(explanation.finding, explanation.run.host)
    if explanation.earlier:
        terminal.say("")
        terminal.facts([(f"attempt {found.attempt}", found.brief) for found in explanation.earlier])
    if explanation.advice:
        terminal.say("")
        terminal.say("  what to do", "bold")
        for text in explanation.advice:
            terminal.say(f"  - {text}")


def _show_finding(found: Finding, host: Host) -> None:
    code = words.code_in_words(found.code) if found.code else ""
    others = f"{_ranks(found.secondary)} only lost the connection" if found.secondary and not found.silent else ""
    silent = f"{_ranks(found.silent)} printed nothing" if found.silent else ""
    notes = [("note", note) for note in found.notes]
    terminal.facts(
        [("meaning", found.cause.meaning), ("code", code), ("others", others), ("silent", silent), *notes]
    )
    log = None
    for line in found.lines:
        if line.log != log:
            log = line.log
            terminal.say("")
            terminal.say(f"  {host.shown(log)}", "dim")
        number = f"{line.number:>6}" if line.number else " " * 6
        terminal.say(f"  {number}  {line.text[:240].expandtabs(4)}")


def _ranks(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {hostlist.spans(ranks)}"


def as_dict(explanation: Explanation) -> dict[str, Any]:
    """For programs; the keys are documented in docs/runs.md and stay."""
    found = explanation.finding
    return {
        "name": explanation.run.name,
        "job_id": explanation.run.job_id,
        "state": explanation.state.state,
        "verdict": explanation.verdict,
        "summary": explanation.summary,
        **_finding_dict(found, explanation.run.host),
        "advice": list(explanation.advice),
        "bad_nodes": explanation.bad_nodes,
        "earlier": [_short_dict(other) for other in explanation.earlier],
    }


def _short_dict(found: Finding) -> dict[str, Any]:
    return {
        "attempt": found.attempt,
        "cause": found.cause.name,
        "title": found.cause.title,
        "rank": found.rank,
        "nodes": list(found.nodes),
        "exit_code": found.code,
    }


def _finding_dict(found: Finding | None, host: Host) -> dict[str, Any]:
    if found is None:
        return {
            **dict.fromkeys(("attempt", "cause", "title", "rank", "nodes", "exit_code")),
            **dict.fromkeys(("meaning", "first_rank", "lost_a_peer", "silent", "notes", "lines")),
        }
    return {
        **_short_dict(found),
        "meaning": found.cause.meaning,
        "first_rank": found.first_rank,
        "lost_a_peer": list(found.secondary),
        "silent": list(found.silent),
        "notes": list(found.notes),
        "lines": [{"log": host.shown(line.log), "line": line.number, "text": line.text} for line in found.lines],
    }


COMMANDS = (explain,)
