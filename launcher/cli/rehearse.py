"""`rehearse`: runs a job's script on a private Slurm of the cluster's shape, and prints a line for each step."""

import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from launcher.cli.options import SectionedOption, job_command
from launcher.cli.planned import planned, print_remarks
from launcher.common import terminal
from launcher.planning.plan import JobPlan
from launcher.sandbox import rehearsal_plan
from launcher.sandbox import rehearse as rehearsal
from launcher.submit import start

KEEP = SectionedOption(["--keep"], section="Job", is_flag=True, help="Keep the rehearsal's folder.")


@click.group()
def rehearse() -> None:
    """Run a job's script on a private Slurm first.

    It runs the script that the cluster would get, with the cluster's topology and a tiny model, on this machine's
    CPU: rendezvous, layout, data, three steps, an early warning, a save and a resume.
    """


def _rehearse(job: str, typed: dict[str, Any], *, keep: bool) -> None:
    """Exit with 0 when all went well, else with 1. The folder of a failed rehearsal is kept."""
    plan = planned(job, typed)
    print_remarks(plan)
    rehearsal.check(plan)
    folder = Path(tempfile.mkdtemp(prefix="rehearsal-"))
    failed = False
    try:
        _try_all(plan, folder)
    except rehearsal.Failed as failure:
        failed = True
        terminal.say(f"FAILED: {failure}", "bold red")
        sys.exit(1)
    finally:
        if keep or failed:
            terminal.say(f"everything of this rehearsal is in {folder}")
        else:
            shutil.rmtree(folder)
    terminal.say("The rehearsal went well.", "bold green")


def _try_all(plan: JobPlan, folder: Path) -> None:
    cluster = plan.profile.name
    terminal.heading(f"a private Slurm in the shape of {cluster}")
    with rehearsal.ended_by_signals(), rehearsal.private_slurm(plan, folder / "slurm") as slurm:
        _tell(rehearsal.described(plan, slurm))
        terminal.heading("a tiny model and some text")
        _tell(rehearsal.prepared(plan, folder))
        mirrored = rehearsal.mirrored(plan, slurm, folder)
        path = start.new_path(mirrored)
        terminal.heading(f"what {cluster} would get, and what runs here")
        terminal.code(rehearsal_plan.script_diff(plan, mirrored, path), "diff")
        terminal.heading("differences from the real job")
        for line in rehearsal_plan.what_differs(plan, mirrored):
            terminal.say(f"  {line}")
        terminal.heading("the rehearsal")
        _tell(rehearsal.tried(mirrored, path, asked=sys.argv[1:]))


def _tell(facts: Iterable[tuple[str, str]]) -> None:
    """Print each fact as it comes."""
    for what, text in facts:
        terminal.facts([(f"{what:<14}", text)])


rehearse.add_command(job_command("finetune", _rehearse, more=(KEEP,)))

COMMANDS = (rehearse,)
