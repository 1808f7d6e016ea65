"""A login node as the host of a cluster: scripts over ssh, and copies of run directories on this machine.

Nothing of ours is needed over there but a POSIX shell; what one question can ask is asked in one round trip.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from launcher.common import printable
from launcher.errors import Fault
from launcher.host import copies, ssh
from launcher.host.base import INTERRUPTED, TIMEOUT, LostError
from launcher.host.follow import Stream
from launcher.host.local import Local
from launcher.host.ssh import NOT_FOUND, Login

END = "mixlaunch-ended"
ATTEND = """
folder=$(mktemp -d) || exit
trap 'rm -rf "$folder"' EXIT
trap 'exit 1' HUP PIPE
cd "$folder" || exit
{files}
{exports}
{command} 2>&1
echo "{end} $?"
"""
# Each file's text, or nothing, and a form feed. `names` may hold patterns; of those the last one counts.
TEXTS = """
for folder in {folders}; do
  for name in {names}; do
    file=$(ls -d "$folder"/$name 2>/dev/null | tail -n 1)
    [ ! -r "$file" ] || cat "$file"
    printf '\\f'
  done
done
"""


@dataclass(frozen=True)
class LoginNode:
    """The way to a cluster that this machine isn't part of."""

    login: Login
    slurm_conf: str | None = None
    is_here = False
    python = None

    @property
    def name(self) -> str:
        return self.login.host

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": self.slurm_conf} if self.slurm_conf else {}

    def call(self, program: str, *arguments: str, timeout: float = TIMEOUT) -> str:
        done = ssh.run(self.login, ssh.command([program, *arguments], self.environment), timeout=timeout)
        if done.code == NOT_FOUND:
            raise Fault(f"{program}: not found on the PATH of {self.name}, nor on that of a login shell there")
        if done.code:
            raise Fault(f"{program}: {done.said}")
        return done.out

    def attend(self, argv: Sequence[str], files: Mapping[str, str], variables: Mapping[str, str]) -> int:
        """When the connection ends its next word is the program's last."""
        written = (f"printf %s {shlex.quote(text)} >{shlex.quote(name)} || exit" for name, text in files.items())
        body = ATTEND.format(
            files="\n".join(written), exports=ssh.exports(variables), command=shlex.join(argv), end=END
        )
        process = ssh.stream(self.login, body)
        assert process.stdout
        try:
            for line in process.stdout:
                if line.startswith(END.encode()):
                    return int(line.split()[1])
                sys.stdout.buffer.write(line)
                sys.stdout.flush()
        except KeyboardInterrupt:
            return INTERRUPTED
        finally:
            ssh.end(process)
        raise LostError(f"login node {self.name}: the connection was lost; the files that were downloaded are kept")

    def exist(self, paths: Sequence[str]) -> list[bool]:
        tests = "\n".join(f"[ -e {shlex.quote(path)} ]; echo $?" for path in paths)
        answers = ssh.run(self.login, tests).out.split() if paths else []
        return [answer == "0" for _, answer in zip(paths, answers, strict=True)]

    def known(self, paths: Sequence[str]) -> list[bool | None]:
        return [None] * len(paths)

    def texts(self, folders: Sequence[str], names: Sequence[str]) -> Iterator[str]:
        body = TEXTS.format(folders=shlex.join(folders), names=" ".join(map(shlex.quote, names)))
        yield from ssh.run(self.login, body).out.split("\f")

    def bring(self, files: Sequence[tuple[Path, str]]) -> None:
        folders = sorted({os.path.dirname(there) for _, there in files})
        if files and (done := ssh.run(self.login, f"exec mkdir -p {shlex.join(folders)}")).code:
            raise Fault(f"{folders[0]} on {self.name}: {done.said}")
        for file, there in files:
            printable.out(f"bringing {file} to {self.name}", err=True)
            slash = "/" if file.is_dir() else ""
            ssh.rsync(self.login, "-rt", "--partial", f"{file}{slash}", ssh.far(self.login, f"{there}{slash}"))

    def noted(self, script: Path, number: int) -> str:
        folder = shlex.quote(str(copies.original(script).parent))
        return ssh.run(self.login, f"cat {folder}/submission/{number}-*/out").out

    @property
    def has_copies(self) -> bool:
        return copies.is_known(self.login)

    def place(self, path: Path) -> Path:
        return path if copies.login_of(path) else copies.place(self.login, path)

    def original(self, path: Path) -> Path:
        return copies.original(path)

    def shown(self, path: Path) -> str:
        return f"{self.name}:{copies.original(path)}"

    def read(self, path: Path) -> bytes:
        return copies.read(self.login, path)

    def read_mine(self, path: Path) -> bytes:
        return copies.read(self.login, path)

    def stranger(self, run: Path) -> str:
        return copies.stranger(self.login, run)

    def put(self, path: Path) -> None:
        ssh.rsync(self.login, "-pt", str(path), ssh.far(self.login, copies.original(path)))

    def pull(self, root: Path) -> None:
        copies.pull(self.login, root)

    def refresh(self, run: Path) -> None:
        copies.refresh(self.login, run)

    def submitting(self, run: Path) -> AbstractContextManager[None]:
        return copies.submitting(run)

    def follow(self, run: Path) -> Stream:
        return Stream(self.login, run)

    def typed(self, *argv: str) -> str:
        options = [word for option in self.login.options for word in ("-o", option)]
        return shlex.join(["ssh", *options, self.login.host, shlex.join(argv)])

    def tunnel(self, address: str, port: int, node: str | None) -> AbstractContextManager[int | None]:
        return ssh.tunnel(ssh.behind(self.login, node) if node else self.login, address, port)


def of(path: Path, slurm_conf: str | None = None) -> LoginNode | Local:
    """The host of a run directory or a folder of them: the login node that it is a copy from, or this machine."""
    login = copies.login_of(path)
    return LoginNode(login, slurm_conf) if login else Local(slurm_conf)
