"""Where a cluster's commands run and its files lie, as an object: this machine, or a login node behind ssh.

Whoever holds one needn't know which. Paths are the cluster's own; `place` says where this machine sees one.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.errors import Fault

TIMEOUT = 30  # seconds; a busy controller takes some
INTERRUPTED = 130
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class LostError(Fault):
    """The connection was lost: the command may or may not have run."""


class MissingError(Fault):
    """The file to copy doesn't exist."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """A finished script: its exit code and its output, without the output of start-up files."""

    code: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """What to quote in an error."""
        return self.err.strip() or self.out.strip() or f"exit {self.code}"


class Growth(Protocol):
    """What keeps the files of a run growing on this machine while somebody reads them."""

    def check(self) -> None:
        """`Fault` if nothing keeps them growing any more."""

    def settle(self) -> None:
        """Wait until everything that is written by now is here, and end."""


class Host(Protocol):
    """One cluster's commands and files. Two that are equal are the same cluster's."""

    @property
    def name(self) -> str:
        """As ssh takes it; empty for this machine."""

    @property
    def is_here(self) -> bool:
        """Whether this machine is one of the cluster's: its folders are at hand, and its nodes are reached."""

    @property
    def environment(self) -> dict[str, str]:
        """The variables that Slurm's commands need there."""

    @property
    def python(self) -> str | None:
        """The Python that has mixlaunch there; None where only a profile knows one."""

    def call(self, program: str, *arguments: str, timeout: float = TIMEOUT) -> str:
        """What a command prints; `Fault` when it's missing, fails or doesn't answer."""

    def attend(self, argv: Sequence[str], files: Mapping[str, str], variables: Mapping[str, str]) -> int:
        """Run a program in the terminal's foreground and return its exit code; Ctrl-C goes to it.

        A word of `argv` that is the name of one of `files` means a file of that text, gone afterwards.
        """

    def exist(self, paths: Sequence[str]) -> list[bool]:
        """Whether each of `paths` is there."""

    def known(self, paths: Sequence[str]) -> list[bool | None]:
        """The same without a network: None for what this machine can't see."""

    def texts(self, folders: Sequence[str], names: Sequence[str]) -> Iterator[str]:
        """Of each folder the files of these names that can be read; of a pattern the last one."""

    def bring(self, files: Sequence[tuple[Path, str]]) -> None:
        """Copy files and folders of this machine to these paths; what is there already costs one look."""

    def noted(self, script: Path, number: int) -> str:
        """What sbatch said of the submission of this number, as far as notes were kept where it ran."""

    # --- what this machine sees of it -----------------------------------------------------------------------------

    @property
    def has_copies(self) -> bool:
        """Whether this machine ever saw runs of it."""

    def place(self, path: Path) -> Path:
        """Where this machine sees a path of the cluster; a place stays what it is."""

    def original(self, path: Path) -> Path:
        """The path of the cluster that is seen at this place."""

    def shown(self, path: Path) -> str:
        """A place for people: PATH or HOST:PATH."""

    def read(self, path: Path) -> bytes:
        """The newest content of the file at this place, which isn't kept; `FileNotFoundError`, `OSError`."""

    def read_mine(self, path: Path) -> bytes:
        """The same of what only this user can have written; `PermissionError` otherwise."""

    def stranger(self, run: Path) -> str:
        """Who else can have written a run directory whose files here can't say so, in a few words."""

    def put(self, path: Path) -> None:
        """Tell the cluster of a file that was changed at this place."""

    def pull(self, root: Path) -> None:
        """Bring what a list of the runs below this place shows up to date."""

    def refresh(self, run: Path) -> None:
        """Bring the run at this place up to date, every log of it."""

    def submitting(self, run: Path) -> AbstractContextManager[None]:
        """While this lasts, the run at this place isn't taken for one that the cluster removed."""

    def follow(self, run: Path) -> Growth | None:
        """What keeps the run in this place growing; None where it grows by itself."""

    # --- the way to it and to its nodes ---------------------------------------------------------------------------

    def typed(self, *argv: str) -> str:
        """What to type on this machine to run a command there."""

    def tunnel(self, address: str, port: int, node: str | None) -> AbstractContextManager[int | None]:
        """A port of this machine that leads to a server, on the loopback of `node` if one is given.

        None where the server is on this very machine.
        """
