"""The commands about runs that exist: what they do, what they said, how to end them.

Each finds its runs by name, prefix or job id under the runs folder of one cluster, or of every known one.
"""

from pathlib import Path

import click

from launcher.errors import MixlaunchError


def of_cluster(command: click.Command) -> click.Command:
    command.params.append(
        click.Option(["--cluster"], metavar="NAME|FILE.yaml", help="Only runs of this cluster.  [default: all]")
    )
    return command


def roots_of(cluster: str | None) -> list[Path]:
    """Where runs may lie: one cluster's folder, or every profile's."""
    from launcher import profile

    if cluster:
        return [Path(profile.load(cluster).paths.runs)]
    roots = [Path(profile.load().paths.runs)]
    for path in profile.available().values():
        try:
            roots.append(Path(profile.read(path).paths.runs))
        except MixlaunchError:
            continue  # `clusters` shows what is wrong with it
    return list(dict.fromkeys(roots))


@of_cluster
@click.command()
@click.argument("names", metavar="[RUN]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Not only the newest 20.")
def status(names: tuple[str, ...], everything: bool, cluster: str | None) -> None:
    """Show what runs are doing.

    All of them, newest first, or the details of RUNs: names, prefixes or job ids.
    """
    from launcher import overview, runs

    roots = roots_of(cluster)
    if names:
        overview.details([runs.find(name, roots) for name in names])
    else:
        found = runs.every(roots)
        overview.table(found if everything else found[:20], roots)


@of_cluster
@click.command("logs")
@click.argument("name", metavar="[RUN]", default="newest")
@click.option("-f", "--follow", is_flag=True, help="Go on as lines come, also into the next attempt.")
@click.option("--rank", type=int, metavar="N", default=0, help="Which rank's log.  [default: 0]")
@click.option("--batch", is_flag=True, help="The batch script's own log.")
@click.option("--attempt", type=int, metavar="N", help="Which attempt's.  [default: the newest]")
def show_logs(name: str, follow: bool, rank: int, batch: bool, attempt: int | None, cluster: str | None) -> None:
    """Print a run's log.

    RUN is a name, a prefix or a job id; by default the newest run.
    """
    from launcher import logs, runs, watch

    run = runs.find(name, roots_of(cluster))
    source = logs.BATCH if batch else rank
    if not follow:
        click.echo(logs.find(run.path, attempt=attempt, source=source).read_text(errors="replace"), nl=False)
        return
    for line in logs.follow(run.path, source=source, attempt=attempt, active=watch.active(run)):
        click.echo(line)


@of_cluster
@click.command()
@click.argument("names", metavar="RUN...", nargs=-1, required=True)
def cancel(names: tuple[str, ...], cluster: str | None) -> None:
    """End runs: names, prefixes or job ids."""
    from launcher import runs, screen

    roots = roots_of(cluster)
    for run in [runs.find(name, roots) for name in names]:
        if runs.cancel(run):
            screen.done(f"{run.name} is told to end")
        else:
            screen.say(f"{run.name} has ended already")


RUN_COMMANDS = (status, show_logs, cancel)
