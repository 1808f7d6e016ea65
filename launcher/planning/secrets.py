"""Secrets: which environment variables a run carries, and the file secrets.env with their values.

A value never goes into a script, record, argument or message, nor into the environment that Slurm keeps.
"""

import os
from collections.abc import Iterable

from launcher.cluster.profile import OF_RANKS, ClusterProfile
from launcher.common import quoting
from launcher.errors import UsageError
from launcher.planning.plan import JobPlan

# Variables that a job uses without being asked, if they are set.
WELCOME = {"download": ("HF_TOKEN",), "serve": ("MIXLAUNCH_API_KEY",)}


def named(profile: ClusterProfile, asked: Iterable[str] = ()) -> tuple[str, ...]:
    """The profile's secrets and those `asked` for by --env; `UsageError` for what can't be one."""
    for name in asked:
        if "=" in name:
            # The text after it may be the secret: it isn't repeated.
            raise UsageError(
                f"--env: give the name alone, {name.partition('=')[0]}; its value comes from your environment. "
                "For a value that everybody may see: -o environment.NAME=VALUE"
            )
        quoting.variable(name, "--env")
        if name in OF_RANKS:
            raise UsageError(f"--env: {name} is set by the launcher: it gives a rank its number")
        if name in profile.environment:
            raise UsageError(f"--env: {name} has a value in the profile's environment, which isn't secret")
    return tuple(dict.fromkeys([*profile.secrets, *asked]))


def carried(plan: JobPlan) -> tuple[str, ...]:
    """Every variable whose value the submission puts into secrets.env."""
    welcome = [name for name in WELCOME.get(plan.job, ()) if os.environ.get(name)]
    return tuple(dict.fromkeys([*plan.secrets, *welcome]))


def require(plan: JobPlan) -> None:
    """`UsageError` naming every secret that has no value here."""
    if absent := [name for name in plan.secrets if not os.environ.get(name)]:
        verb = "isn't" if len(absent) == 1 else "aren't"
        raise UsageError(f"secrets: {', '.join(absent)} {verb} set in your environment")
