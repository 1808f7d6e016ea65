"""What commands about runs have in common: RUN, --cluster, --json, and the folders in which runs are looked for."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from launcher.cli import completion
from launcher.cluster import catalog, profile
from launcher.errors import MixlaunchError
from launcher.host import copies

Decorator = Callable[[Any], Any]

AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs; the keys are in docs/runs.md.")
IN_CLUSTER = click.option(
    "--cluster",
    metavar="NAME|FILE.yaml",
    help="Only runs of this cluster.  [default: all]",
    shell_complete=completion.clusters,
)


def run_argument(name: str = "name", **how: Any) -> Decorator:
    """An argument that names a run, or several."""
    return click.argument(name, **{"metavar": "RUN", "shell_complete": completion.runs, **how})


NEWEST = run_argument(metavar="[RUN]", default="newest")
MANY = run_argument("names", metavar="[RUN]...", nargs=-1)


def roots_of(cluster: str | None) -> list[Path]:
    """Where runs may lie: one cluster's folder, or every profile's.

    Of clusters behind login nodes only the default one is asked unless runs there are known here already.
    """
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
