"""Arguments that commands about runs share: RUN, --cluster, --json."""

from collections.abc import Callable
from typing import Any

import click

from launcher.cli import completion

Decorator = Callable[[Any], Any]

AS_JSON = click.option("--json", "as_json", is_flag=True, help="For programs; the keys are in docs/runs.md.")
OTHERS = click.option("--others", is_flag=True, help="RUN may be another user's, by its full name.")
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
