"""The machine one is on, as the host of a cluster: commands are processes, files are at hand, nothing is copied."""

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from launcher.common import processes, shared_files
from launcher.errors import Fault
from launcher.host import ssh
from launcher.host.base import INTERRUPTED, LOOPBACK, TIMEOUT
from launcher.host.ssh import Login

OF_THE_SHELL = ("sh", "id")  # questions about the machine itself, which need no Slurm


@dataclass(frozen=True)
class Local:
    """This machine, with the configuration of its Slurm where the environment doesn't name the right one."""

    slurm_conf: str | None = None
    name = ""
    is_here = True
    python = sys.executable
    has_copies = True

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": self.slurm_conf} if self.slurm_conf else {}

    def call(self, program: str, *arguments: str, timeout: float = TIMEOUT) -> str:
        path = processes.which(program)
        if path is None:
            raise Fault(f"{program}: not found; Slurm's commands aren't on this machine's PATH")
        if program not in OF_THE_SHELL:
            self.require_conf()
        try:
            done = subprocess.run(
                [path, *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            raise Fault(f"{program}: no answer within {timeout:g} s") from None
        except OSError as error:
            raise Fault(f"{program}: {error}") from error
        if done.returncode:
            reason = done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}"
            raise Fault(f"{program}: {reason}")
        return done.stdout

    def require_conf(self) -> None:
        """`Fault` if the configuration doesn't exist: Slurm's commands would look for it for a minute."""
        if self.slurm_conf and not os.path.exists(self.slurm_conf):
            raise Fault(
                f"slurm_conf: {self.slurm_conf} isn't on this machine; "
                "it is on a login node, a sandbox's while that is up"
            )

    def attend(self, argv: Sequence[str], files: Mapping[str, str], variables: Mapping[str, str]) -> int:
        with tempfile.TemporaryDirectory(prefix="mixlaunch-") as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text)
            argv = [str(Path(folder, word)) if word in files else word for word in argv]
            with subprocess.Popen(argv, env={**os.environ, **variables}) as process:
                try:
                    return process.wait()
                except KeyboardInterrupt:
                    process.wait()
                    return INTERRUPTED

    def exist(self, paths: Sequence[str]) -> list[bool]:
        return [os.path.exists(path) for path in paths]

    def known(self, paths: Sequence[str]) -> list[bool | None]:
        return [*self.exist(paths)]

    def texts(self, folders: Sequence[str], names: Sequence[str]) -> Iterator[str]:
        for path in [path for folder in folders for name in names for path in sorted(Path(folder).glob(name))[-1:]]:
            with contextlib.suppress(OSError, UnicodeDecodeError):
                yield path.read_text()

    def bring(self, files: Sequence[tuple[Path, str]]) -> None:
        """Nothing: this machine's files are the cluster's."""

    def noted(self, script: Path, number: int) -> str:
        return ""  # here sbatch is never left alone with its answer

    def place(self, path: Path) -> Path:
        return path

    def original(self, path: Path) -> Path:
        return path

    def shown(self, path: Path) -> str:
        return str(path)

    def read(self, path: Path) -> bytes:
        return shared_files.read(path)

    def read_mine(self, path: Path) -> bytes:
        return shared_files.read_mine(path)

    def stranger(self, run: Path) -> str:
        return ""  # its files say it themselves

    def put(self, path: Path) -> None:
        pass

    def pull(self, root: Path) -> None:
        pass

    def refresh(self, run: Path) -> None:
        pass

    def submitting(self, run: Path) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def follow(self, run: Path) -> None:
        return None

    def typed(self, *argv: str) -> str:
        return shlex.join(argv)

    def tunnel(self, address: str, port: int, node: str | None) -> AbstractContextManager[int | None]:
        if node:
            return ssh.tunnel(Login(node), address, port)
        if address in (*LOOPBACK, socket.gethostname()):
            return contextlib.nullcontext()
        return ssh.tunnel(Login(address), "localhost", port)
