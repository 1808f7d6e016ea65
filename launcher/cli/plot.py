"""The command `plot`: a run's loss and expert load as a picture.

The job's own package draws it, in a process of its own, from the events in the run directory.
"""

import os
import subprocess
import sys

import click

from launcher.cli.runs import of_cluster, roots_of
from launcher.errors import Fault, UsageError


@of_cluster
@click.command()
@click.argument("name", metavar="RUN")
@click.option(
    "-o", "--output", metavar="FILE", help="Where to: .png, .svg or .pdf.  [default: plot.png in the run]"
)
def plot(name: str, output: str | None, cluster: str | None) -> None:
    """Draw a run's loss and expert load.

    RUN is a name, a job's id, a prefix, or a path; it may still be running. Needs matplotlib here.
    """
    from launcher.runs import record

    run = record.find(name, roots_of(cluster))
    target = os.path.abspath(os.path.expanduser(output)) if output else str(run.path / "plot.png")
    argv = [sys.executable, "-m", "megatron_mixtral.observability.plot", str(run.path), target]
    drawn = subprocess.run(argv, capture_output=True, text=True, check=False)
    if drawn.returncode:
        said = drawn.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise (UsageError if drawn.returncode == 2 else Fault)(said)
    click.echo(drawn.stdout.strip())
