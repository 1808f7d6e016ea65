"""A job of one process run here and now, in the terminal's foreground: `download` on a login node.

It reads its configuration from a folder that is gone afterwards; there is no run directory and nothing to look up.
"""

import os

from launcher.errors import UsageError
from launcher.planning import inputs, secrets
from launcher.planning.plan import JobPlan
from launcher.script import render
from megatron_mixtral.spec.rundir import CONFIG


def run(plan: JobPlan) -> int:
    """Run `plan`'s job where its host is, and return its exit code. Ctrl-C goes to it; what it fetched stays."""
    inputs.require_file_system(plan)
    secrets.require(plan)
    host = plan.profile.host
    if host.python is None and plan.profile.in_container:
        raise UsageError(f"{plan.job}: its Python is in a container; give --as-job, or run it on {host.name}")
    argv = [host.python or plan.profile.python, "-P", "-m", "megatron_mixtral", plan.job, "--config", CONFIG]
    variables = {name: os.environ[name] for name in secrets.carried(plan)}
    return host.attend(argv, {CONFIG: render.config_text(plan)}, variables)
