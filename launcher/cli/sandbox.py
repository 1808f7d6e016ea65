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
    """Run a private, real Slurm on this machine.

    Its profile is the cluster `sandbox`. It runs as you, in its own folder and on its own ports, and touches no
    other Slurm.
    """


@sandbox.command("up")
@click.option(
    "--nodes", type=click.IntRange(1, 64), default=4, show_default=True, help="Number of nodes to simulate."
)
@click.option(
    "--gpus", type=click.IntRange(0, 16), default=8, show_default=True, help="GPUs of each node to simulate."
)
@click.option("--accounting/--no-accounting", default=None, help="Run sacct and accounts.  [default: if installed]")
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
    """Say whether it is up, and what its nodes do. Exits with 1 if it isn't up."""
    found = lifecycle.status()
    if as_json:
        told = {"folder": str(found.folder), "state": found.state, "dead": list(found.dead)}
        terminal.as_json(told | {"nodes": found.nodes, "jobs": found.jobs})
        sys.exit(0 if found.state == "up" else 1)
    terminal.say(f"sandbox is {found.state}: {found.folder}")
    terminal.facts([("dead", ", ".join(found.dead)), *found.nodes.items()])
    sys.exit(0 if found.state == "up" else 1)


COMMANDS = (sandbox,)
