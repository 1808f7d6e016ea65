"""Starts the sandbox's daemons with its mark, records them at once, and waits until they answer.

munge, and MariaDB for slurmdbd, are private to the sandbox's folder.
"""

import contextlib
import getpass
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from launcher.common import processes
from launcher.errors import Fault
from launcher.sandbox.config import ACCOUNT, CLUSTER, DATABASE
from launcher.sandbox.record import MARK, Sandbox, write


def start_munge(sandbox: Sandbox, deadline: float) -> None:
    """munged with its own key and socket."""
    folder, socket = sandbox.folder, sandbox.sockets / "munge.socket"
    options = {
        "key-file": "munge.key",
        "seed-file": "munge.seed",
        "pid-file": "run/munged.pid",
        "log-file": "logs/munged.log",
    }
    paths = [f"--{option}={folder / name}" for option, name in options.items()]
    # --force, because munged expects a socket for all users, and this socket is only for its owner.
    launch(sandbox, "munged", "munged", "--foreground", "--force", f"--socket={socket}", *paths)
    wait(sandbox, socket.exists, deadline)


def start_accounting(sandbox: Sandbox, deadline: float) -> None:
    """MariaDB and slurmdbd, with the entries that Slurm needs: cluster, accounts, QoS and this user."""
    _start_mariadb(sandbox, deadline)
    launch(sandbox, "slurmdbd", "slurmdbd", "-D")
    wait(sandbox, lambda: _answers(sandbox, "sacctmgr", "--noheader", "list", "cluster"), deadline)
    user, shape = getpass.getuser(), sandbox.shape
    accounts = list(dict.fromkeys((ACCOUNT, *shape.accounts)))
    qos = [name for name in shape.qos if name != "normal"]  # which is there from the start
    _add(sandbox, "cluster", CLUSTER)
    for name in qos:
        _add(sandbox, "qos", name)
    for name in accounts:
        _add(sandbox, "account", name, f"cluster={CLUSTER}")
    _add(sandbox, "user", user, f"account={','.join(accounts)}", f"defaultaccount={ACCOUNT}", "adminlevel=admin")
    if qos:
        call(sandbox, "sacctmgr", "--immediate", "modify", "user", user, "set", f"qos+={','.join(qos)}")


def launch(sandbox: Sandbox, name: str, program: str, *arguments: str) -> None:
    """Start one daemon in the foreground of a session of its own and record it."""
    folder = sandbox.folder
    argv = [processes.which(program) or program, *arguments]
    log = folder / "logs" / f"{name}.out"
    sandbox.processes[name] = processes.start(argv, env=_environment(sandbox), cwd=folder, log=log)
    write(sandbox)


def wait(sandbox: Sandbox, condition: Callable[[], bool], deadline: float) -> None:
    """Wait for `condition`; `Fault` if a started daemon ends, or it takes too long."""
    while not condition():
        for name, pid in sandbox.processes.items():
            if processes.ended(pid):
                raise Fault(f"{name} ended at once")
        if time.monotonic() > deadline:
            raise Fault("it took too long")
        time.sleep(0.05)


def call(sandbox: Sandbox, program: str, *arguments: str) -> str:
    """Run one of Slurm's commands on the sandbox and return its output."""
    return sandbox.host.call(program, *arguments, timeout=15)


def _start_mariadb(sandbox: Sandbox, deadline: float) -> None:
    database = sandbox.folder / "database"
    options = ["--no-defaults", f"--datadir={database / 'data'}", f"--tmpdir={database / 'tmp'}"]
    options += ["--innodb-log-file-size=8M", "--innodb-buffer-pool-size=16M"]
    if os.getuid() == 0:
        options.append(f"--user={getpass.getuser()}")
    _install_mariadb(sandbox, options)
    # slurmdbd could make its database itself, but Debian 13's MariaDB client crashes on the reconnection after
    # that.
    (database / "init.sql").write_text(f"create database {DATABASE};\n")
    # No grant tables are needed: only the user can reach the socket's folder, and nothing listens on the network.
    options += ["--skip-networking", "--skip-grant-tables", "--innodb-flush-log-at-trx-commit=0"]
    options += [f"--socket={_socket(sandbox)}", f"--init-file={database / 'init.sql'}"]
    launch(sandbox, "mariadbd", "mariadbd", *options, f"--pid-file={sandbox.folder}/run/mariadb.pid")
    wait(sandbox, _socket(sandbox).exists, deadline)


def _install_mariadb(sandbox: Sandbox, options: list[str]) -> None:
    program = processes.which("mariadb-install-db") or "mariadb-install-db"
    argv = [program, *options, "--auth-root-authentication-method=normal", "--skip-test-db"]
    with (sandbox.folder / "logs" / "mariadb-install-db.out").open("ab") as log:
        done = subprocess.run(
            argv, env=_environment(sandbox), stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=90
        )
    if done.returncode:
        raise Fault("mariadb-install-db failed")


def _environment(sandbox: Sandbox) -> dict[str, str]:
    """The environment of each process of the sandbox. Its mark finds the process again, even after a crash."""
    ours = {MARK: sandbox.mark, "MYSQL_UNIX_PORT": str(_socket(sandbox))}
    return {**os.environ, **sandbox.host.environment, **ours}


def _socket(sandbox: Sandbox) -> Path:
    return sandbox.sockets / "database.socket"


def _add(sandbox: Sandbox, *what: str) -> None:
    call(sandbox, "sacctmgr", "--immediate", "add", *what)


def _answers(sandbox: Sandbox, *argv: str) -> bool:
    with contextlib.suppress(Fault):
        call(sandbox, *argv)
        return True
    return False
