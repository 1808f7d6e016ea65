"""The commands about cluster profiles.

They read profiles and ask Slurm; none of them submits anything.
"""

import json
from collections.abc import Callable
from typing import Any

import click

from launcher.options import override

JSON = click.Option(["--json", "as_json"], is_flag=True, help="For programs.")


def _with(*options: click.Option) -> Callable[[click.Command], click.Command]:
    """Give a command options that others have, too."""

    def add(command: click.Command) -> click.Command:
        command.params.extend(options)
        return command

    return add


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


@click.group(invoke_without_command=True)
@click.pass_context
def clusters(ctx: click.Context) -> None:
    """List cluster profiles, show, check or make one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(clusters_list, as_json=False)


@_with(JSON)
@clusters.command("list")
def clusters_list(as_json: bool) -> None:
    """Every profile that --cluster can name."""
    from launcher import cluster_view

    if as_json:
        _print_json(cluster_view.listed())
    else:
        cluster_view.table()


@_with(override(), JSON)
@clusters.command("show")
@click.argument("name", metavar="[NAME|FILE.yaml]", required=False)
def clusters_show(name: str | None, override: tuple[str, ...], as_json: bool) -> None:
    """A profile as it is understood: parents merged, variables expanded, defaults filled in."""
    from launcher import cluster_view, screen

    path, cluster = cluster_view.read(name, override)
    if as_json:
        _print_json(cluster_view.dumped(cluster))
        return
    click.echo(f"# {path}", err=True)
    screen.code(cluster_view.text(cluster), "yaml")
