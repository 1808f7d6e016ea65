"""`pipeline`: the whole chain in one command, its jobs queued one after another.

On a cluster Slurm keeps the order, and ends what can't start any more; on this machine one step runs after another.
"""

import sys
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.options import FORCE, SectionedCommand, SectionedOption, job_command, understood

if TYPE_CHECKING:
    from launcher.submit.pipeline import Chain

OWN = (
    SectionedOption(["--output"], section="What", metavar="DIR", help="Where the export goes.  [default: models]"),
    SectionedOption(["--dry-run"], section="Job", is_flag=True, help="Show every step; touch nothing."),
    SectionedOption(
        ["--wait/--no-wait"], section="Job", default=None, help="Wait for the end.  [default: on this machine]"
    ),
    FORCE,
)
HELP = """Download, convert, train and export in one go.

FILES are prepared on the way; without any, --data or what `prepare` wrote is trained on. What is there already is
left out. Layout, --nodes, --time and the settings are finetune's; --name heads the name of every step.
"""


def _pipeline(
    *, files: tuple[str, ...], output: str | None, dry_run: bool, wait: bool | None, force: bool, **typed: Any
) -> None:
    from launcher.planning import uploads
    from launcher.submit import pipeline

    cluster, options = understood("finetune", typed)
    chain = pipeline.plan(cluster, files=uploads.redirect(cluster, files), output=output, **options)
    if dry_run:
        _show(chain)
    pipeline.check(chain, force=force)
    if not dry_run:
        sys.exit(_start(chain, wait=cluster.is_local if wait is None else wait))


def _show(chain: "Chain") -> None:
    from launcher.common import terminal
    from launcher.planning import describe

    makers = {path: step.name for step in chain.steps for path in step.makes}
    for number, step in enumerate(chain.steps, 1):
        plan, after = step.plan, ", ".join(other.name for other in step.after(chain.steps))
        inputs = [given for given in plan.inputs if given.path in makers]
        made = {given.what: f"{given.path}  ({makers[given.path]} makes it)" for given in inputs}
        told = describe.facts(plan.outlook) if plan.job == "finetune" and plan.outlook else []
        facts = [(name, made.get(name, text)) for name, text in describe.plan_facts(plan)]
        terminal.heading(f"{number} {step.name}")
        terminal.facts([*facts, *told, ("after", after), ("run", str(step.path))])
    terminal.facts([(f"{name} left out", f"{path} is there") for name, path in chain.there])


def _start(chain: "Chain", *, wait: bool) -> int:
    from launcher.common import terminal
    from launcher.planning import describe
    from launcher.submit import pipeline

    asked = tuple(sys.argv[1:])
    for step in chain.steps:
        for remark in describe.remarks(step.plan):
            click.echo(f"note: {step.name}: {remark}", err=True)
    for name, path in chain.there:
        terminal.say(f"{name} is left out: {path} is there")
    if chain.steps[0].plan.profile.is_local:
        return pipeline.run_here(chain, asked=asked)
    runs = pipeline.submit(chain, asked=asked)
    terminal.done(f"{len(runs)} jobs submitted to {runs[0].cluster}")
    terminal.facts([(step.name, _place(run.record)) for step, run in zip(chain.steps, runs, strict=True)])
    if wait:
        return pipeline.to_the_end(runs)
    terminal.facts(
        [("watch", "mixlaunch status --watch"), ("cancel", f"mixlaunch cancel {' '.join(r.name for r in runs)}")]
    )
    return 0


def _place(record: dict[str, Any]) -> str:
    after = record["pipeline"]["jobs"]
    return f"job {record['jobs'][-1]}{f', after {chr(32).join(after)}' if after else ''}: {record['name']}"


def _command() -> click.Command:
    """finetune's options, FILES, and what is a pipeline's own."""
    finetune = job_command("finetune", lambda _: None)
    files = click.Argument(["files"], nargs=-1, metavar="[FILES]...")
    return SectionedCommand(
        "pipeline",
        callback=_pipeline,
        params=[files, *finetune.params, *OWN],
        help=HELP,
        context_settings=finetune.context_settings,
    )


pipeline_command = _command()
