"""A port of this machine that leads to a server on a node: through the login node, or from there straight on.

A server that listens on its node's own loopback is reached by ssh to that node; any other from the login node.
"""

import contextlib
import dataclasses
import ipaddress
import shlex
import socket
from collections.abc import Iterator
from typing import Any

from launcher.errors import Fault
from launcher.host import copies, ssh
from launcher.host.ssh import Login
from launcher.runs import servers, states
from launcher.runs.record import Run
from launcher.runs.servers import Server
from launcher.slurm import client, hostlist

LOOPBACK = ("127.0.0.1", "::1", "localhost")


@contextlib.contextmanager
def opened(run: Run) -> Iterator[Server]:
    """The server of `run` at an address of this machine, for as long as the block lasts."""
    server, state = servers.of_run(run), servers.state_of(run)
    way = _way(run, state)
    if way is None:
        yield server
        return
    login, host = way
    port = _free_port(state["port"])
    ssh.forward(login, port, host, state["port"])
    try:
        yield dataclasses.replace(server, url=f"http://127.0.0.1:{port}")
    finally:
        ssh.unforward(login, port, host, state["port"])


@contextlib.contextmanager
def if_needed(server: Server) -> Iterator[Server]:
    """`server` as it is, or, where its run is behind a login node, at the end of a tunnel."""
    if server.run is None or copies.login_of(server.run.path) is None:
        yield server
        return
    with opened(server.run) as near:
        yield near


def _way(run: Run, state: dict[str, Any]) -> tuple[Login, str] | None:
    """Where to log in and what to ask for there; None for a server of this very machine."""
    login, host = copies.login_of(run.path), state["host"]
    if host not in LOOPBACK:
        return (login, host) if login else _from_login_node(host)
    node = _first_node(run)
    if node is None or _is_loopback(_address(run, node)):
        return (login, host) if login else None
    return (behind(login, node) if login else Login(node)), host


def _from_login_node(host: str) -> tuple[Login, str] | None:
    return None if host == socket.gethostname() else (Login(host), "localhost")


def behind(login: Login, node: str) -> Login:
    """A node that only the login node sees: its connection goes through the one that is open already."""
    user, at, _ = login.host.rpartition("@")
    words = [word.replace("%", "%%") for word in ssh.words(login)]
    return Login(f"{user}{at}{node}", (f"ProxyCommand={shlex.join(words)} -W %h:%p {login.host}",))


def _first_node(run: Run) -> str | None:
    """Rank 0's; None where no Slurm places it."""
    if run.is_local:
        return None
    nodes = hostlist.expand(states.of_run(run).nodes)
    if not nodes:
        raise Fault(f"{run.name}: its node isn't known")
    return nodes[0]


def _address(run: Run, node: str) -> str:
    """The node's, as Slurm knows it."""
    line = client.call("scontrol", "--oneliner", "show", "node", node, environment=run.environment)
    words = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return words.get("NodeAddr", node)


def _is_loopback(address: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(address).is_loopback
    return address == "localhost"


def _free_port(preferred: int) -> int:
    """The server's own number where that is free here."""
    for port in (preferred, 0):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise Fault("no free port on this machine")
