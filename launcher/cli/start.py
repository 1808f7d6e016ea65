"""What a job command does: plan, then show or submit, and watch.

A job on this machine is watched to its end. On a cluster it is left to the queue; only a server is waited for.
"""

import sys
from typing import Any

from launcher.cli import watch
from launcher.cli.planned import planned, print_remarks
from launcher.common import terminal
from launcher.planning import describe, inputs
from launcher.planning.jobs import JobPlan
from launcher.script import lint, render
from launcher.submit import foreground
from launcher.submit import start as submission


def start(
    job: str,
    typed: dict[str, Any],
    *,
    dry_run: bool,
    wait: bool | None,
    follow: bool,
    exclude: tuple[str, ...],
    health_check: bool,
    force: bool = False,
    tunnel: bool = False,
) -> None:
    """Submit the job that was asked for, or show what a submission would do."""
    plan = submission.keep_off(planned(job, typed), exclude, health_check=health_check)
    if dry_run:
        # Planning needs no network: a list behind a login node is read when the job is submitted.
        _show(plan if plan.profile.login_node else submission.leave_out(plan))
    describe.require(plan, force=force)
    if dry_run:
        return
    inputs.require(plan)
    print_remarks(plan)
    sys.exit(watch.submit(plan, asked=tuple(sys.argv[1:]), wait=wait, follow=follow, through_tunnel=tunnel))


def _show(plan: JobPlan, *, script: bool = True) -> None:
    """What a submission would do, without doing any of it."""
    run_dir = submission.new_path(plan)
    text = render.render(plan, str(run_dir))
    lint.check(text, plan.profile.slurm_version)
    terminal.heading(f"{plan.job}: what would run")
    outlook = describe.facts(plan.outlook) if plan.outlook else []
    terminal.facts([*describe.plan_facts(plan), *outlook, ("run", str(run_dir) if script else "")])
    terminal.heading("config.yaml")
    terminal.code(render.config_text(plan), "yaml")
    if script:
        terminal.heading("job.sbatch")
        terminal.code(text, "bash")


def download(job: str, typed: dict[str, Any], *, as_job: bool, dry_run: bool, **how: Any) -> None:
    """Downloads need the network, which compute nodes often lack: they run here unless told otherwise."""
    if as_job:
        start(job, typed, dry_run=dry_run, **how)
    elif dry_run:
        _show(planned(job, typed), script=False)
    else:
        sys.exit(foreground.run(planned(job, typed)))
