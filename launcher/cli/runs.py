"""The commands about runs that exist: what they do, what they said, how to end them.

Each finds its runs by name, prefix or job id under the runs folder of one cluster, or of every known one.
"""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.errors import MixlaunchError

if TYPE_CHECKING:
    from launcher.runs.record import Run

NEWEST = 20  # runs that `status` shows


def of_cluster(command: click.Command) -> click.Command:
    command.params.append(
        click.Option(["--cluster"], metavar="NAME|FILE.yaml", help="Only runs of this cluster.  [default: all]")
    )
    return command


def roots_of(cluster: str | None) -> list[Path]:
    """Where runs may lie: one cluster's folder, or every profile's.

    Of clusters behind login nodes only the default one is asked unless runs there are known here already.
    """
    from launcher.cluster import catalog, profile
    from launcher.host import copies

    if cluster is not None:
        return [profile.load(cluster).runs_here]
    roots = [profile.load().runs_here]
    for path in catalog.available().values():
        try:
            found = profile.read(path)
        except MixlaunchError:
            continue  # `clusters` shows what is wrong with it
        if found.login_node is None or copies.is_known(found.login_node):
            roots.append(found.runs_here)
    return list(dict.fromkeys(roots))


AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs; the keys are in docs/runs.md.")


@of_cluster
@click.command()
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Not only the newest 20.")
@click.option("-w", "--watch", is_flag=True, help="Go on: a table that moves, off a terminal a line for all news.")
@AS_JSON
def status(names: tuple[str, ...], everything: bool, watch: bool, as_json: bool, cluster: str | None) -> None:
    """Show what runs are doing.

    All of them, newest first, or the details of RUNs: names, prefixes or job ids.
    """
    from launcher.cli import live
    from launcher.cli import status as overview
    from launcher.common import terminal
    from launcher.runs import record, report

    roots = roots_of(cluster)

    def find() -> "Sequence[Run]":
        if names:
            return [record.find(name, roots) for name in names]
        return record.every(roots)[: None if everything else NEWEST]

    if watch:
        live.watch(find, until_ended=bool(names), as_json=as_json)
        return
    found = find()
    facts = report.Reporter()(found)
    if as_json:
        terminal.as_json(facts)
    elif names:
        overview.details(found, facts)
    else:
        overview.table(facts, roots)


class RankType(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions of click
    """A rank's number, or `all`."""

    name = "rank"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        if value != "all" and not str(value).isdigit():
            self.fail(f"{value!r} is neither a rank's number nor `all`", param, ctx)
        return "all" if value == "all" else int(value)


class Regex(click.ParamType):  # type: ignore[type-arg]
    """A regular expression in Python's syntax."""

    name = "regex"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> "re.Pattern[str]":
        try:
            return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            self.fail(f"{value!r} isn't a regular expression: {error}", param, ctx)


@of_cluster
@click.command("logs")
@click.argument("name", metavar="[RUN]", default="newest")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, also into the next attempt.")
@click.option("--rank", type=RankType(), metavar="N|all", default=0, help="Which rank's log.  [default: 0]")
@click.option("--batch", is_flag=True, help="The batch script's own log.")
@click.option("--attempt", type=int, metavar="N", help="Which attempt's.  [default: the newest]")
@click.option("--grep", "pattern", type=Regex(), metavar="REGEX", help="Only lines that match.")
def show_logs(
    name: str,
    follow: bool,
    rank: int | str,
    batch: bool,
    attempt: int | None,
    pattern: "re.Pattern[str] | None",
    cluster: str | None,
) -> None:
    """Print a run's log.

    RUN is a name, a prefix or a job id; by default the newest run. With --rank all each line is headed by its rank.
    """
    from launcher.runs import follow as follow_run
    from launcher.runs import record

    run = record.find(name, roots_of(cluster))
    source = "batch" if batch else rank
    for line in follow_run.log_lines(run, source=source, attempt=attempt, follow=follow, pattern=pattern):
        click.echo(line)


@of_cluster
@click.command("explain")
@click.argument("name", metavar="[RUN]", default="newest")
@click.option("--attempt", type=int, metavar="N", help="Which attempt.  [default: what the run came to]")
@click.option("--mark-bad", is_flag=True, help="Put the nodes that failed on the cluster's list of bad ones.")
@click.option("--for", "lasting", default="7d", metavar="12h|7d|2w|forever", help="How long.  [default: 7d]")
@AS_JSON
def explain_run(
    name: str, attempt: int | None, mark_bad: bool, lasting: str, as_json: bool, cluster: str | None
) -> None:
    """Say why a run ended, or how it does.

    The first rank and node that failed, what its end means, the lines that show it, and what to do. RUN is a
    name, a prefix or a job id; by default the newest run.
    """
    from launcher.common import terminal
    from launcher.diagnose import explain
    from launcher.runs import record

    told = explain.explain(record.find(name, roots_of(cluster)), attempt=attempt)
    if mark_bad:
        explain.mark_bad(told, lasting)
    if as_json:
        terminal.as_json(explain.as_dict(told))
    else:
        explain.show(told)


@of_cluster
@click.command()
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--stuck", is_flag=True, help="Every run that waits for a job that failed, and so can't start.")
def cancel(names: tuple[str, ...], stuck: bool, cluster: str | None) -> None:
    """End runs: names, prefixes or job ids."""
    from launcher.common import terminal
    from launcher.runs import record
    from launcher.submit import pipeline

    if not names and not stuck:
        raise click.UsageError("Missing argument 'RUN...'; or give --stuck")
    roots = roots_of(cluster)
    found = [record.find(name, roots) for name in names]
    if stuck and not (hopeless := pipeline.stuck(record.every(roots))):
        terminal.say("every run that waits can still start")
    elif stuck:
        found += hopeless
    for run in found:
        if record.cancel(run):
            terminal.done(f"{run.name} is told to end")
        else:
            terminal.say(f"{run.name} has ended already")


def _again(command: Callable[..., None]) -> Callable[..., None]:
    """What `resume` and `retry` can be asked for."""
    for option in (
        click.option("--time", metavar="LIMIT", help="Another time limit.  [default: the one it had]"),
        click.option("--exclude", multiple=True, metavar="NODES", help="Nodes to leave out; repeat it."),
        click.option("--exclude-failed", is_flag=True, help="Leave out the nodes that failed, as `explain` says."),
        click.option("--wait", is_flag=True, help="Wait for the end."),
        click.option("--follow", is_flag=True, help="Wait, and print rank 0's log."),
    )[::-1]:
        command = option(command)
    return command


@of_cluster
@click.command()
@click.argument("name", metavar="RUN")
@_again
def resume(name: str, cluster: str | None, wait: bool, follow: bool, **how: Any) -> None:
    """Go on with a run that ended too early.

    Same run directory, script and configuration, from what it saved: a new job is its next attempt.
    """
    _run_again("resume", name, cluster, wait or follow, follow, **how)


@of_cluster
@click.command()
@click.argument("name", metavar="RUN")
@_again
def retry(name: str, cluster: str | None, wait: bool, follow: bool, **how: Any) -> None:
    """Run a failed run again.

    In its own run directory, from its newest checkpoint where it has one; with --exclude-failed on other nodes.
    """
    _run_again("retry", name, cluster, wait or follow, follow, **how)


def _run_again(
    how: str,
    name: str,
    cluster: str | None,
    wait: bool,
    follow: bool,
    *,
    time: str | None,
    exclude: tuple[str, ...],
    exclude_failed: bool,
) -> None:
    from launcher.cli import watch
    from launcher.common import terminal
    from launcher.diagnose import explain
    from launcher.runs import record
    from launcher.slurm import hostlist
    from launcher.submit import resume as again

    run = record.find(name, roots_of(cluster))
    nodes = {*hostlist.of_option("--exclude", exclude), *(explain.failed_nodes(run) if exclude_failed else ())}
    act = again.resume if how == "resume" else again.retry
    run = act(run, time=time, exclude=sorted(nodes))
    terminal.done(f"{run.name} goes on {'here' if run.is_local else f'as job {run.job_id} on {run.cluster}'}")
    terminal.facts(
        [("without", hostlist.compress(nodes)), ("follow", "" if wait else f"mixlaunch logs -f {run.name}")]
    )
    if wait:
        sys.exit(watch.to_the_end(run, follow=follow))


RUN_COMMANDS = (status, show_logs, explain_run, resume, retry, cancel)
