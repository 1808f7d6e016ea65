"""Runs a job of one process in the terminal's foreground: `download` on a login node.

Its configuration is in a temporary folder. It has no run directory.
"""

import os

from launcher.errors import UsageError
from launcher.planning import inputs, secrets
from launcher.planning.plan import JobPlan
from launcher.script import render
from megatron_mixtral.spec.rundir import CONFIG


def run(plan: JobPlan) -> int:
    """Run `plan`'s job where its host is, and return its exit code. Ctrl-C reaches the job; its files stay."""
    inputs.require_file_system(plan)
    secrets.require(plan)
    host = plan.profile.host
    if host.python is None and plan.profile.in_container:
        raise UsageError(f"{plan.job}: its Python is in a container; give --as-job, or run it on {host.name}")
    argv = [host.python or plan.profile.python, "-P", "-m", "megatron_mixtral", plan.job, "--config", CONFIG]
    variables = {name: os.environ[name] for name in secrets.carried(plan)}
    return host.attend(argv, {CONFIG: render.config_text(plan)}, variables)
