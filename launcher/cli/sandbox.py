"""The commands about the private Slurm of this machine.

What they start, `sandbox down` ends.
"""

import sys

import click

from launcher.common import terminal
from launcher.sandbox import lifecycle
from launcher.sandbox.config import ClusterShape


@click.group()
def sandbox() -> None:
    """A private, real Slurm on this machine.

    Its profile is the cluster `sandbox`. It runs as you, in a folder and on ports of its own, and touches no other.
    """


@sandbox.command("up")
@click.option("--nodes", type=click.IntRange(1, 64), default=4, show_default=True, help="Nodes to pretend.")
@click.option("--gpus", type=click.IntRange(0, 16), default=8, show_default=True, help="GPUs a node to pretend.")
@click.option("--accounting/--no-accounting", default=None, help="sacct and accounts.  [default: if installed]")
def sandbox_up(nodes: int, gpus: int, accounting: bool | None) -> None:
    """Start it and wait until its nodes are idle."""
    started = lifecycle.up(shape=ClusterShape(nodes=nodes, gpus=gpus), accounting=accounting)
    terminal.done(f"sandbox is up: {started.shape.nodes} nodes x {started.shape.gpus} GPUs")
    configuration = f"SLURM_CONF={started.folder}/slurm.conf"
    terminal.facts(
        [
            ("accounts", "" if started.accounting else lifecycle.why_no_accounting(accounting)),
            ("use it", "mixlaunch finetune --cluster sandbox"),
            ("or", f"{configuration} sinfo"),
        ]
    )


@sandbox.command("down")
def sandbox_down() -> None:
    """End its jobs and daemons and remove its folder."""
    if lifecycle.down():
        terminal.done("sandbox is gone")
    else:
        terminal.say("there was no sandbox")


@sandbox.command("status")
@click.option("--json", "as_json", is_flag=True, help="For programs: folder, state, dead daemons, nodes, jobs.")
def sandbox_status(as_json: bool) -> None:
    """Say whether it is up and what its nodes do; exits with 1 when it isn't."""
    found = lifecycle.status()
    if as_json:
        told = {"folder": str(found.folder), "state": found.state, "dead": list(found.dead)}
        terminal.as_json(told | {"nodes": found.nodes, "jobs": found.jobs})
        sys.exit(0 if found.state == "up" else 1)
    terminal.say(f"sandbox is {found.state}: {found.folder}")
    terminal.facts([("dead", ", ".join(found.dead)), *found.nodes.items()])
    sys.exit(0 if found.state == "up" else 1)


COMMANDS = (sandbox,)
