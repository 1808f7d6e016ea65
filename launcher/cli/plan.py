"""`plan JOB`: a job's layout and memory, and whether it fits, without a submission.

Exit codes are those of the submission: 2 for a job that would be refused, with the nearest layouts that fit.
"""

import sys
from typing import Any

import click

from launcher.cli.options import PARALLEL, SectionedOption, job_command
from launcher.cli.planned import planned
from launcher.common import terminal
from launcher.errors import LayoutError
from launcher.planning import describe

JSON = SectionedOption(
    ["--json", "as_json"], section="Job", is_flag=True, help="Print everything as JSON, for programs."
)


@click.group()
def plan() -> None:
    """Say whether a job fits, before the queue does.

    It prints the layout equation, tokens a step, pipeline bubble, traffic over the fabric and memory per GPU. If
    the job doesn't fit, it prints the nearest layouts that fit.
    """


def _show(job: str, typed: dict[str, Any], *, as_json: bool) -> None:
    plan = planned(job, typed)
    assert plan.outlook is not None
    if as_json:
        ranks = {"world": plan.world, "nodes": plan.nodes, "tasks_per_node": plan.tasks_per_node}
        told = {"job": plan.job, "cluster": plan.profile.name, **ranks, **describe.as_json(plan.outlook)}
        terminal.as_json(told)
        sys.exit(0 if told["fits"] else 2)
    terminal.heading(f"{plan.job} on {plan.profile.name}")
    terminal.facts([*describe.plan_facts(plan), *describe.facts(plan.outlook)])
    describe.require(plan, force=False)


def _refusal_as_json(command: click.Command) -> click.Command:
    """`command` that prints JSON for a refused layout as well."""
    inner = command.callback
    assert inner is not None

    def callback(**typed: Any) -> None:
        asked = typed["as_json"]
        try:
            inner(**typed)
        except LayoutError as error:
            if not asked:
                raise
            terminal.as_json({"job": command.name, "fits": False, **describe.refusal_json(error)})
            sys.exit(2)

    command.callback = callback
    return command


for _job in PARALLEL:
    plan.add_command(_refusal_as_json(job_command(_job, _show, more=(JSON,))))

COMMANDS = (plan,)
