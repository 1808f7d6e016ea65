"""A tunnel: a port of this machine that leads through the login node to a server on a node.

A server that listens on its node's loopback is reached by ssh to that node, and any other from the login node.
"""

import contextlib
import dataclasses
import ipaddress
from collections.abc import Iterator

from launcher.errors import Fault
from launcher.host.base import LOOPBACK
from launcher.runs import servers, states
from launcher.runs.record import Run
from launcher.runs.servers import Server
from launcher.slurm import hostlist


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Server]:
    """The server of `run` at an address of this machine, for as long as the block lasts."""
    server, state = servers.of_run(run), servers.state_of(run)
    node = _first_node(run) if state["host"] in LOOPBACK else None
    with run.host.tunnel(state["host"], state["port"], node) as port:
        yield dataclasses.replace(server, url=f"http://127.0.0.1:{port}") if port else server


@contextlib.contextmanager
def if_needed(server: Server) -> Iterator[Server]:
    """`server` as it is, or, where this machine isn't one of its cluster's, at the end of a tunnel."""
    if server.run is None or server.run.host.is_here:
        yield server
        return
    with opened(server.run) as near:
        yield near


def _first_node(run: Run) -> str | None:
    """Rank 0's; None where no Slurm places it, and where its address is the loopback itself."""
    if run.is_local:
        return None
    nodes = hostlist.expand(states.of_run(run).nodes)
    if not nodes:
        raise Fault(f"{run.name}: its node isn't known")
    return None if _is_loopback(_address(run, nodes[0])) else nodes[0]


def _address(run: Run, node: str) -> str:
    """The node's, as Slurm knows it."""
    line = run.host.call("scontrol", "--oneliner", "show", "node", node)
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return words.get("NodeAddr", node)


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"
