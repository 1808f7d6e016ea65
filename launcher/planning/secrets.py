"""Secrets by name: which variables of the environment a run carries, and secrets.env, the place of their values.

Their values go into no script, record, argument or message, and not into the environment that Slurm keeps.
"""

import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cluster.profile import OF_RANKS, ClusterProfile
from launcher.common import quoting
from launcher.errors import Fault, UsageError

if TYPE_CHECKING:
    from launcher.planning.jobs import JobPlan

FILE = "secrets.env"
# What a job makes use of by itself, where it is set.
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
            raise UsageError(f"--env: {name} is the launcher's own: by it a rank knows its place")
        if name in profile.environment:
            raise UsageError(f"--env: {name} has a value in the profile's environment, which isn't secret")
    return tuple(dict.fromkeys([*profile.secrets, *asked]))


def carried(plan: "JobPlan") -> tuple[str, ...]:
    """Every variable whose value the submission puts into secrets.env."""
    welcome = [name for name in WELCOME.get(plan.job, ()) if os.environ.get(name)]
    return tuple(dict.fromkeys([*plan.secrets, *welcome]))


def require(plan: "JobPlan") -> None:
    """`UsageError` naming every secret that has no value here."""
    if absent := [name for name in plan.secrets if not os.environ.get(name)]:
        verb = "isn't" if len(absent) == 1 else "aren't"
        raise UsageError(f"secrets: {', '.join(absent)} {verb} set in your environment")


def write(plan: "JobPlan", run_dir: Path) -> None:
    """Make secrets.env, which only its owner reads; none if there is nothing to put in."""
    names = carried(plan)
    if not names:
        return
    text = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in names)
    try:
        descriptor = os.open(run_dir / FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(os.fsencode(text))
    except OSError as error:
        raise Fault(f"{run_dir / FILE}: {error.strerror}") from error


def without(environment: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """`environment` less the run's secrets: Slurm keeps what sbatch hands it in files of its own."""
    try:
        lines = (run_dir / FILE).read_bytes().splitlines()
    except OSError:
        return dict(environment)
    names = {os.fsdecode(line.partition(b"=")[0]) for line in lines}
    return {name: value for name, value in environment.items() if name not in names}
