"""The commands about bad nodes: which nodes a cluster's jobs avoid, why, and until when.

Submissions exclude them with --exclude, which a dry run shows.
"""

import dataclasses

import click

from launcher.cli import completion
from launcher.cli.run_arguments import AS_JSON
from launcher.cluster import bad_nodes, profile
from launcher.cluster.profile import ClusterProfile
from launcher.common import quoting, terminal, words
from launcher.errors import Fault, UsageError
from launcher.slurm import hostlist

CLUSTER = click.option(
    "--cluster",
    metavar="NAME|FILE.yaml",
    help="Cluster of the nodes.  [default: $MIXLAUNCH_CLUSTER, else local]",
    shell_complete=completion.clusters,
)


@click.group(invoke_without_command=True)
@CLUSTER
@AS_JSON
@click.pass_context
def nodes(ctx: click.Context, as_json: bool, cluster: str | None) -> None:
    """Keep jobs away from bad nodes.

    Without a command it shows the cluster's list: each node with its reason and expiry. Every submission excludes
    these nodes.
    """
    if ctx.invoked_subcommand is None:
        _show(cluster, as_json)


@nodes.command("list")
@CLUSTER
@AS_JSON
def list_nodes(as_json: bool, cluster: str | None) -> None:
    """Show the list."""
    _show(cluster, as_json)


def _show(cluster: str | None, as_json: bool) -> None:

    loaded = profile.load(cluster)
    found = bad_nodes.read(loaded)
    if as_json:
        terminal.as_json([dataclasses.asdict(entry) for entry in found])
    elif not found:
        terminal.say(f"no bad nodes of {loaded.name} in {bad_nodes.path(loaded)}")
    else:
        rows = [
            (entry.node, words.moment(entry.until) if entry.until else "forever", entry.by, entry.reason)
            for entry in found
        ]
        terminal.table(("NODE", "UNTIL", "BY", "REASON"), rows)


@nodes.command("add")
@CLUSTER
@click.argument("names", metavar="NODE...", nargs=-1, required=True)
@click.option("--reason", required=True, help="What is wrong with the nodes.")
@click.option("--for", "lasting", default="7d", show_default=True, metavar="12h|7d|2w|forever", help="How long.")
def add(names: tuple[str, ...], reason: str, lasting: str, cluster: str | None) -> None:
    """Put nodes on the list: gpu07, gpu[01-04]."""
    loaded = profile.load(cluster)
    wanted, until = _expanded(names), bad_nodes.duration(lasting)
    quoting.checked(reason, "--reason")
    bad_nodes.require_file_system(loaded)
    _known(loaded, wanted)
    bad_nodes.add(loaded, dict.fromkeys(wanted, reason), until)
    terminal.done(f"jobs on {loaded.name} avoid {', '.join(wanted)}{f' for {lasting}' if until else ''}")


@nodes.command("remove")
@CLUSTER
@click.argument("names", metavar="NODE...", nargs=-1, required=True)
def remove(names: tuple[str, ...], cluster: str | None) -> None:
    """Take nodes off the list."""
    loaded = profile.load(cluster)
    wanted = _expanded(names)
    there = [entry.node for entry in bad_nodes.read(loaded)]
    if missing := [name for name in wanted if name not in there]:
        listed = ", ".join(there) or "none"
        raise UsageError(f"{', '.join(missing)}: not on the list of {loaded.name}; there are: {listed}")
    bad_nodes.remove(loaded, wanted)
    terminal.done(f"{', '.join(wanted)} may be used again")


def _expanded(names: tuple[str, ...]) -> list[str]:

    return hostlist.expand(",".join(names))


def _known(cluster: ClusterProfile, wanted: list[str]) -> None:
    """Refuse a name that Slurm doesn't know: with it on the list, every later submission would fail."""
    if cluster.is_local:
        raise UsageError(f"{cluster.name}: its jobs run only on this machine; there are no nodes to exclude")
    arguments = ("--noheader", "--Node", "--format=%N")
    try:
        lines = cluster.host.call("sinfo", *arguments).splitlines()
    except Fault:
        return
    there = [line.strip() for line in lines if hostlist.NAME.fullmatch(line.strip())]  # a notice is no node
    if missing := [name for name in wanted if name not in there]:
        near = words.nearest(missing[0], there, most=3) or there[:3]
        raise UsageError(f"{missing[0]}: no node of {cluster.name}; nearest: {', '.join(near)}")


COMMANDS = (nodes,)
