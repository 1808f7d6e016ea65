"""The commands that change what a run does: `cancel` ends it, `resume` and `retry` make it go on."""

import sys
from collections.abc import Callable
from typing import Any

import click

from launcher.cli import watch
from launcher.cli.run_arguments import IN_CLUSTER, MANY, run_argument
from launcher.common import terminal
from launcher.diagnose import explain
from launcher.runs import find, states
from launcher.runs.record import Run
from launcher.slurm import hostlist
from launcher.submit import resume as again

AGAIN = (
    click.Option(["--time"], metavar="LIMIT", help="Another time limit.  [default: the one it had]"),
    click.Option(["--exclude"], multiple=True, metavar="NODES", help="Nodes to leave out; repeat it."),
    click.Option(["--exclude-failed"], is_flag=True, help="Leave out the nodes that failed, as `explain` says."),
    click.Option(["--wait"], is_flag=True, help="Wait for the end."),
    click.Option(["--follow"], is_flag=True, help="Wait, and print rank 0's log."),
)


@click.command(params=[*AGAIN])
@run_argument()
@IN_CLUSTER
def resume(**how: Any) -> None:
    """Go on with a run that ended too early.

    Same run directory, script and configuration, from what it saved: a new job is its next attempt.
    """
    _go_on(again.resume, **how)


@click.command(params=[*AGAIN])
@run_argument()
@IN_CLUSTER
def retry(**how: Any) -> None:
    """Run a failed run again.

    In its own run directory, from its newest checkpoint where it has one; with --exclude-failed on other nodes.
    """
    _go_on(again.retry, **how)


def _go_on(
    act: Callable[..., Run],
    *,
    name: str,
    cluster: str | None,
    time: str | None,
    exclude: tuple[str, ...],
    exclude_failed: bool,
    wait: bool,
    follow: bool,
) -> None:
    run = find.run(name, find.roots_of(cluster))
    nodes = {*hostlist.of_option("--exclude", exclude), *(explain.failed_nodes(run) if exclude_failed else ())}
    run = act(run, time=time, exclude=sorted(nodes))
    watched = wait or follow
    terminal.done(f"{run.name} goes on {'here' if run.is_local else f'as job {run.job_id} on {run.cluster}'}")
    terminal.facts(
        [("without", hostlist.compress(nodes)), ("follow", "" if watched else f"mixlaunch logs -f {run.name}")]
    )
    if watched:
        sys.exit(watch.to_the_end(run, follow=follow))


@click.command()
@MANY
@click.option("--stuck", is_flag=True, help="Every run that waits for a job that failed, and so can't start.")
@IN_CLUSTER
def cancel(names: tuple[str, ...], stuck: bool, cluster: str | None) -> None:
    """End runs: names, prefixes or job ids."""
    if not names and not stuck:
        raise click.UsageError("Missing argument 'RUN...'; or give --stuck")
    roots = find.roots_of(cluster)
    found = [find.run(name, roots) for name in names]
    if stuck and not (hopeless := states.stuck(find.every(roots))):
        terminal.say("every run that waits can still start")
    elif stuck:
        found += hopeless
    for run in found:
        if states.cancel(run):
            terminal.done(f"{run.name} is told to end")
        else:
            terminal.say(f"{run.name} has ended already")


COMMANDS = (cancel, resume, retry)
