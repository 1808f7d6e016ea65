"""`pipeline`: submits the whole chain with one command.

On a cluster Slurm keeps the order, and cancels jobs that can no longer start. On this machine the steps run one
after another.
"""

import sys
from collections.abc import Sequence
from typing import Any

import click

from launcher.cli import watch
from launcher.cli.options import FORCE, SectionedCommand, SectionedOption, job_command
from launcher.cli.planned import print_remarks, understood
from launcher.common import terminal
from launcher.errors import Interrupted
from launcher.planning import describe, uploads
from launcher.runs import states
from launcher.runs.record import Run
from launcher.submit import pipeline as chain
from launcher.submit.pipeline import Pipeline

OWN = (
    SectionedOption(["--output"], section="What", metavar="DIR", help="Folder of the export.  [default: models]"),
    SectionedOption(["--dry-run"], section="Job", is_flag=True, help="Show every step; change nothing."),
    SectionedOption(
        ["--wait/--no-wait"],
        section="Job",
        default=None,
        help="Wait until the job ends.  [default: on this machine]",
    ),
    FORCE,
)
HELP = """Download, convert, train and export in one go.

FILES are prepared first. Without FILES, training uses --data or what `prepare` wrote before. Steps whose output
exists are left out. Layout, --nodes, --time and the settings are finetune's. Every step's name begins with --name.
"""


def _pipeline(
    *, files: tuple[str, ...], output: str | None, dry_run: bool, wait: bool | None, force: bool, **typed: Any
) -> None:
    cluster, options = understood("finetune", typed)
    planned = chain.plan(cluster, files=uploads.redirect(cluster, files), output=output, **options)
    if dry_run:
        _show(planned)
    chain.check(planned, force=force)
    if not dry_run:
        sys.exit(_start(planned, wait=cluster.is_local if wait is None else wait))


def _show(planned: Pipeline) -> None:
    makers = {path: job.name for job in planned.jobs for path in job.makes}
    for number, job in enumerate(planned.jobs, 1):
        plan, after = job.plan, ", ".join(other.name for other in job.after(planned.jobs))
        inputs = [given for given in plan.inputs if given.path in makers]
        made = {given.what: f"{given.path}  ({makers[given.path]} makes it)" for given in inputs}
        outlook = describe.facts(plan.outlook) if plan.job == "finetune" and plan.outlook else []
        facts = [(name, made.get(name, text)) for name, text in describe.plan_facts(plan)]
        terminal.heading(f"{number} {job.name}")
        terminal.facts([*facts, *outlook, ("after", after), ("run", str(job.path))])
    terminal.facts([(f"{name} left out", f"{path} is there") for name, path in planned.there])


def _start(planned: Pipeline, *, wait: bool) -> int:
    asked = tuple(sys.argv[1:])
    for job in planned.jobs:
        print_remarks(job.plan, f"{job.name}: ")
    for name, path in planned.there:
        terminal.say(f"{name} is left out: {path} is there")
    if planned.jobs[0].plan.profile.is_local:
        return _run_here(planned, asked)
    runs = chain.submit(planned, asked=asked)
    terminal.done(f"{len(runs)} jobs submitted to {runs[0].cluster}")
    terminal.facts([(job.name, _place(run.record)) for job, run in zip(planned.jobs, runs, strict=True)])
    if wait:
        return to_the_end(runs)
    terminal.facts(
        [("watch", "mixlaunch status --watch"), ("cancel", f"mixlaunch cancel {' '.join(r.name for r in runs)}")]
    )
    return 0


def _place(record: dict[str, Any]) -> str:
    after = record["pipeline"]["jobs"]
    return f"job {record['jobs'][-1]}{f', after {chr(32).join(after)}' if after else ''}: {record['name']}"


def to_the_end(started: Sequence[Run]) -> int:
    """Watch the jobs one after another; when one fails, what can't start any more is cancelled. The exit code."""
    for place, run in enumerate(started):
        code = watch.to_the_end(run, follow=False)
        if code == Interrupted.exit_code:
            return code
        if code:
            for later in started[place + 1 :]:
                if states.cancel(later):
                    terminal.say(f"{later.name} is cancelled: it can no longer start")
            return code
    return 0


def _run_here(planned: Pipeline, asked: Sequence[str]) -> int:
    """One job after another as processes of this machine; the first that fails ends it. The exit code."""
    for run in chain.run_in_turn(planned, asked=asked):
        if code := watch.to_the_end(run, follow=False):
            return code
    return 0


def _command() -> click.Command:
    """finetune's options, FILES, and the pipeline's own options."""
    finetune = job_command("finetune", lambda *_: None)
    files = click.Argument(["files"], nargs=-1, metavar="[FILES]...")
    return SectionedCommand(
        "pipeline",
        callback=_pipeline,
        params=[files, *finetune.params, *OWN],
        help=HELP,
        context_settings=finetune.context_settings,
    )


COMMANDS = (_command(),)
