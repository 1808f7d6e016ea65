"""The commands about cluster profiles.

They read profiles and ask Slurm; none of them submits anything.
"""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import click

from launcher.cli.options import override

JSON = click.Option(["--json", "as_json"], is_flag=True, help="For programs.")


def _with(*options: click.Option) -> Callable[[click.Command], click.Command]:
    """Give a command options that others have, too."""

    def add(command: click.Command) -> click.Command:
        command.params.extend(options)
        return command

    return add


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
    from launcher.cli import cluster_view
    from launcher.common import terminal

    if as_json:
        terminal.as_json(cluster_view.listed())
    else:
        cluster_view.table()


@_with(override(), JSON)
@clusters.command("show")
@click.argument("name", metavar="[NAME|FILE.yaml]", required=False)
def clusters_show(name: str | None, override: tuple[str, ...], as_json: bool) -> None:
    """A profile as it is understood: parents merged, variables expanded, defaults filled in."""
    from launcher.cli import cluster_view
    from launcher.common import terminal

    path, cluster = cluster_view.read(name, override)
    if as_json:
        terminal.as_json(cluster_view.dumped(cluster))
        return
    click.echo(f"# {path}", err=True)
    terminal.code(cluster_view.text(cluster), "yaml")


@_with(override(), JSON)
@clusters.command("check")
@click.argument("name", metavar="[NAME|FILE.yaml]", required=False)
def clusters_check(name: str | None, override: tuple[str, ...], as_json: bool) -> None:
    """Hold a profile against the live cluster.

    Partition, account, QoS, reservation, features, node shape, time limit, version, image and paths; then sbatch
    --test-only for a whole node. Exits with 2 if something in the profile is wrong, 1 if Slurm can't be asked.
    """
    from launcher.cli import cluster_view
    from launcher.common import terminal
    from launcher.diagnose import profile_check

    path, cluster = cluster_view.read(name, override)
    findings = []
    for finding in profile_check.check(cluster):
        findings.append(finding)
        if not as_json:
            cluster_view.finding(finding)
    wrong = any(finding.verdict == "failed" for finding in findings)
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        terminal.as_json({"cluster": cluster.name, "file": str(path), "ok": not wrong, "findings": found})
    sys.exit(2 if wrong else 0)


@clusters.command("schema")
def clusters_schema() -> None:
    """JSON schema of a profile, for editors.

    Begin a profile with `# yaml-language-server: $schema=FILE` to have keys completed and checked as you type.
    """
    from launcher.cluster import json_schema
    from launcher.common import terminal

    terminal.as_json(json_schema.schema())


@clusters.command("template")
@click.argument("part", required=False)
def clusters_template(part: str | None) -> None:
    """Print a part of the script's template, to be changed and named under `templates:`.

    Without PART, the names of all.
    """
    from launcher.script import stock

    click.echo(stock.source(part) if part else "\n".join(stock.names()), nl=not part)


@clusters.command("new")
@click.argument("name", required=False)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE.yaml", help="Where to.")
def clusters_new(name: str | None, output: Path | None) -> None:
    """Write a profile for the cluster that one stands on.

    Slurm is asked what it has; what it can't tell is left as a comment to fill in. NAME is by default what the
    cluster calls itself; the file goes into your own profiles, and one that is there already is never touched.
    """
    from launcher.cluster import discover
    from launcher.common import terminal

    written = discover.write(name, output)
    terminal.done(
        f"{written} is written; read it through, then: mixlaunch clusters check {discover.called(written)}"
    )
