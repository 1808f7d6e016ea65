"""The commands that change a run: `cancel` ends it, and `resume` and `retry` continue it."""

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
    click.Option(["--time"], metavar="LIMIT", help="New time limit.  [default: the same as before]"),
    click.Option(
        ["--exclude"], multiple=True, metavar="NODES", help="Nodes that the job must not get; can be repeated."
    ),
    click.Option(["--exclude-failed"], is_flag=True, help="Exclude the nodes that failed according to `explain`."),
    click.Option(["--wait"], is_flag=True, help="Wait until the job ends."),
    click.Option(["--follow"], is_flag=True, help="Wait, and print rank 0's log."),
)


@click.command(params=[*AGAIN])
@run_argument()
@IN_CLUSTER
def resume(**how: Any) -> None:
    """Continue a run that ended before it was done.

    A new job continues from what the run saved, in the same run directory, with the same script and configuration.
    """
    _go_on(again.resume, **how)


@click.command(params=[*AGAIN])
@run_argument()
@IN_CLUSTER
def retry(**how: Any) -> None:
    """Run a failed run again.

    The new job runs in the same run directory, and starts from the newest checkpoint if there is one.
    --exclude-failed runs it on other nodes.
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
@click.option(
    "--stuck", is_flag=True, help="End every run that can't start, because it waits for a job that failed."
)
@IN_CLUSTER
def cancel(names: tuple[str, ...], stuck: bool, cluster: str | None) -> None:
    """End runs: names, prefixes or job ids."""
    if not names and not stuck:
        raise click.UsageError("Missing argument 'RUN...'; or give --stuck")
    roots = find.roots_of(cluster)
    found = [find.run(name, roots) for name in names]
    if stuck and not (hopeless := states.stuck(find.every(roots))):
        terminal.say("every waiting run can still start")
    elif stuck:
        found += hopeless
    for run in found:
        if states.cancel(run):
            terminal.done(f"{run.name} is being cancelled")
        else:
            terminal.say(f"{run.name} has ended already")


COMMANDS = (cancel, resume, retry)
