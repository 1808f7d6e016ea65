"""What a job command does: plan, then show or submit, and watch.

A job on this machine is watched to its end. On a cluster it is left to the queue; only a server is waited for.
"""

import sys
from typing import Any

from launcher.cli import watch
from launcher.cli.planned import planned, print_remarks
from launcher.cluster import bad_nodes
from launcher.common import terminal
from launcher.errors import UsageError
from launcher.planning import describe, inputs
from launcher.planning.plan import JobPlan
from launcher.script import lint, render
from launcher.submit import foreground, start
from megatron_mixtral.spec import rundir


def run(
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
    plan = start.keep_off(planned(job, typed), exclude, health_check=health_check)
    if dry_run:
        _show(start.leave_out(plan, bad_nodes.known(plan.profile)))
    describe.require(plan, force=force)
    if dry_run:
        return
    inputs.require(plan)
    print_remarks(plan)
    sys.exit(submit(plan, asked=tuple(sys.argv[1:]), wait=wait, follow=follow, tunnel=tunnel))


def submit(plan: JobPlan, *, asked: tuple[str, ...], wait: bool | None, follow: bool, tunnel: bool = False) -> int:
    """Submit, print it, and watch as long as `wait` says; returns the exit code.

    True is to the end. None is to the end on this machine; elsewhere a server is watched until it is ready, and any
    other job not at all. A tunnel to a server is held until Ctrl-C.
    """
    if tunnel and plan.profile.is_local:
        raise UsageError("--tunnel: this server runs on this machine")
    made = start.run(plan, asked=asked)
    where = "this machine" if made.is_local else f"{made.cluster} as job {made.job_id}"
    terminal.done(f"{plan.job} {'started on' if made.is_local else 'submitted to'} {where}")
    facts = [(name, value) for name, value in describe.plan_facts(plan) if name in ("ranks", "layout", "limit")]
    later = [("follow", f"mixlaunch logs -f {made.name}"), ("cancel", f"mixlaunch cancel {made.name}")]
    until_ready = tunnel or (wait is None and plan.job == "serve" and not made.is_local and not follow)
    until_end = follow or (made.is_local if wait is None else wait)
    terminal.facts([*facts, ("run", made.host.shown(made.path)), *([] if until_end else later)])
    if until_ready:
        return watch.to_ready(made, through_tunnel=tunnel)
    return watch.to_the_end(made, follow=follow) if until_end else 0


def _show(plan: JobPlan, *, script: bool = True) -> None:
    """Show what a submission would do."""
    run_dir = start.new_path(plan)
    text = render.render(plan, str(run_dir))
    lint.check(text, plan.profile.slurm_version)
    terminal.heading(f"{plan.job}: what would run")
    outlook = describe.facts(plan.outlook) if plan.outlook else []
    terminal.facts([*describe.plan_facts(plan), *outlook, ("run", str(run_dir) if script else "")])
    terminal.heading(rundir.CONFIG)
    terminal.code(render.config_text(plan), "yaml")
    if script:
        terminal.heading(rundir.SCRIPT)
        terminal.code(text, "bash")


def download(job: str, typed: dict[str, Any], *, as_job: bool, dry_run: bool, **how: Any) -> None:
    """Downloads need the internet, which compute nodes often lack, so they run here by default."""
    if as_job:
        run(job, typed, dry_run=dry_run, **how)
    elif dry_run:
        _show(planned(job, typed), script=False)
    else:
        sys.exit(foreground.run(planned(job, typed)))
