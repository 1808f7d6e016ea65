"""The commands of the chain that are jobs. What they do is in `run_job`, which is imported when one is called."""

import importlib
from collections.abc import Callable
from typing import Any

import click

from launcher.cli.options import FORCE, PARALLEL, SectionedOption, job_command


def _later(name: str) -> Callable[..., None]:
    """The function of `run_job` with that name."""

    def call(*given: Any, **more: Any) -> None:
        getattr(importlib.import_module("launcher.cli.run_job"), name)(*given, **more)

    return call


def _flag(name: str, help: str) -> click.Option:
    return SectionedOption([name], section="Job", is_flag=True, help=help)


START = (
    _flag("--dry-run", "Show script, configuration and layout; change nothing."),
    SectionedOption(
        ["--wait/--no-wait"],
        section="Job",
        default=None,
        help="Wait until the job ends.  [default: on this machine; on a cluster `serve` waits until it answers]",
    ),
    _flag("--follow", "Wait, and print rank 0's log."),
    SectionedOption(
        ["--exclude"],
        section="Job",
        multiple=True,
        metavar="NODES",
        help="Nodes that the job must not get; can be repeated.",
    ),
    _flag("--health-check", "Test every node before the ranks start."),
)
AS_JOB = _flag("--as-job", "Run as a job, not here in the foreground.")
TUNNEL = _flag("--tunnel", "Wait until the server answers, then forward a port of this machine to it until Ctrl-C.")
MORE = {"serve": (TUNNEL,)}
UNDER = {"convert": (job_command("verify", _later("run"), more=START),)}


def _command(job: str) -> click.Command:
    more = (*START, *((FORCE,) if job in PARALLEL else ()), *MORE.get(job, ()))
    return job_command(job, _later("run"), more=more, under=UNDER.get(job, ()))


COMMANDS = (
    job_command("download", _later("download"), more=(*START, AS_JOB)),
    *map(_command, ("prepare", "convert", "finetune", "serve", "tiny")),
)
