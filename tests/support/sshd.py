"""A real sshd on loopback, of this user's own: own keys, own port, gone with the test that wanted it."""

import contextlib
import os
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import end_with_pytest

from launcher.common import processes
from launcher.host import ssh

SEPARATION = Path("/run/sshd")  # sshd as root wants it; Debian makes it at boot, where sshd is a service


@dataclass
class Server:
    """`options` is what the profile's `login.options` says; `log` counts connections."""

    folder: Path
    port: int
    process: subprocess.Popen

    @contextlib.contextmanager
    def again(self):
        """A server that was ended, started anew at the same port."""
        self.process.wait()
        self.process = start(self.folder, self.port)
        yield

    @property
    def options(self) -> dict[str, str]:
        return {
            "Port": str(self.port),
            "IdentityFile": str(self.folder / "key"),
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": str(self.folder / "known"),
            "StrictHostKeyChecking": "yes",
        }

    @property
    def login(self) -> ssh.Login:
        return ssh.Login("127.0.0.1", tuple(sorted(f"{name}={value}" for name, value in self.options.items())))

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()

    @property
    def sessions(self) -> int:
        """Round trips: commands that were run."""
        return self.log.count("Starting session: command")

    @property
    def connections(self) -> int:
        return self.log.count("Accepted publickey")


def find() -> str | None:
    """sshd wants to be called by its path."""
    return processes.which("sshd")


@contextlib.contextmanager
def running(folder: Path, environment: dict[str, str]):
    """One sshd whose sessions have `environment`; sessions that are left are ended with it."""
    folder.mkdir(parents=True)
    for name in ("host", "key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "authorized").write_bytes((folder / "key.pub").read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    know(folder, port, folder / "host.pub")
    (folder / "config").write_text(configuration(folder, port, environment | end_with_pytest.marks()))
    if os.getuid() == 0:
        SEPARATION.mkdir(exist_ok=True)  # and left: tests beside this one may need it
    server = Server(folder, port, start(folder, port))
    try:
        yield server
    finally:
        ssh.close(server.login)
        server.process.terminate()
        server.process.wait()


def start(folder: Path, port: int) -> subprocess.Popen:
    process = subprocess.Popen([find(), "-D", "-f", str(folder / "config"), "-E", str(folder / "log")])
    answers(port)
    return process


def configuration(folder: Path, port: int, environment: dict[str, str]) -> str:
    variables = " ".join(f'"{name}={value}"' for name, value in environment.items())
    return f"""
ListenAddress 127.0.0.1
Port {port}
HostKey {folder}/host
PidFile {folder}/pid
AuthorizedKeysFile {folder}/authorized
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin yes
LogLevel VERBOSE
SetEnv {variables}
"""


def know(folder: Path, port: int, key: Path) -> None:
    """Take `key` for the server's own."""
    kind, text, *_ = key.read_text().split()
    (folder / "known").write_text(f"[127.0.0.1]:{port} {kind} {text}\n")


def answers(port: int) -> None:
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        assert time.monotonic() < deadline, "sshd doesn't answer"
        time.sleep(0.05)
