"""`export JOB`: prints a job's script, or writes a folder with everything that it needs. Plain `sbatch` runs it."""

import sys
from pathlib import Path
from typing import Any

import click

from launcher.cli.options import HELP, SectionedOption, job_command
from launcher.cli.planned import planned, print_remarks
from launcher.common import printable, terminal
from launcher.script import bundle, lint, render

BUNDLE = SectionedOption(
    ["--bundle", "bundle_dir"],
    section="Job",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a folder: script, config.yaml, README.",
)


@click.group()
def export() -> None:
    """Print a job's self-contained script, or write a folder with it.

    Plain `sbatch` runs it. It needs only a Python with megatron_mixtral where the ranks run.
    """


def _export(job: str, typed: dict[str, Any], *, bundle_dir: Path | None) -> None:
    plan = planned(job, typed)
    if bundle_dir is not None:
        written = bundle.write(plan, bundle_dir, asked=sys.argv[1:])
        terminal.done(f"{', '.join(path.name for path in written)} in {bundle_dir}")
        return
    script = render.render(plan)
    lint.check(script, plan.profile.slurm_version)
    printable.out(script, end="")
    print_remarks(plan)


for _job in HELP:
    export.add_command(job_command(_job, _export, more=(BUNDLE,)))

COMMANDS = (export,)
