"""`logs` prints a run's log, and `plot` draws its loss."""

import os
import re
import subprocess
import sys
from typing import Any

import click

from launcher.cli.run_arguments import IN_CLUSTER, NEWEST, OTHERS, run_argument
from launcher.common import printable
from launcher.errors import Fault, UsageError
from launcher.runs import find
from launcher.runs import follow as going_on


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

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> re.Pattern[str]:
        try:
            return re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            self.fail(f"{value!r} isn't a regular expression: {error}", param, ctx)


@click.command()
@NEWEST
@click.option("-f", "--follow", is_flag=True, help="Print new lines as they come, also those of the next attempt.")
@click.option("--rank", type=RankType(), metavar="N|all", default=0, help="Rank whose log to print.  [default: 0]")
@click.option("--batch", is_flag=True, help="Print the batch script's own log.")
@click.option("--attempt", type=int, metavar="N", help="Attempt whose log to print.  [default: the newest]")
@click.option("--grep", "pattern", type=Regex(), metavar="REGEX", help="Print only lines that match.")
@OTHERS
@IN_CLUSTER
def logs(
    name: str,
    follow: bool,
    rank: int | str,
    batch: bool,
    attempt: int | None,
    pattern: re.Pattern[str] | None,
    others: bool,
    cluster: str | None,
) -> None:
    """Print a run's log.

    RUN is a name, a prefix or a job id. The default is the newest run. With --rank all, each line begins with its
    rank.
    """
    run = find.run(name, find.roots_of(cluster), others=others)
    source = "batch" if batch else rank
    for line in going_on.log_lines(run, source=source, attempt=attempt, follow=follow, pattern=pattern):
        printable.out(line)


@click.command()
@run_argument()
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="File to write: .png, .svg or .pdf.  [default: plot.png in the run directory]",
)
@IN_CLUSTER
def plot(name: str, output: str | None, cluster: str | None) -> None:
    """Draw a run's loss and expert load.

    RUN is a name, a job id, a prefix, or a path. It may still be running. This needs matplotlib on this machine.
    """
    run = find.run(name, find.roots_of(cluster))
    target = os.path.abspath(os.path.expanduser(output)) if output else str(run.path / "plot.png")
    # The job's package draws it in its own process, from the events in the run directory.
    argv = [sys.executable, "-m", "megatron_mixtral.observability.plot", str(run.path), target]
    drawn = subprocess.run(argv, capture_output=True, text=True, check=False)
    if drawn.returncode:
        said = drawn.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
        raise (UsageError if drawn.returncode == 2 else Fault)(said)
    printable.out(drawn.stdout.strip())


COMMANDS = (logs, plot)
