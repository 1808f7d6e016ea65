"""Lets several processes write files into one folder, which gets its name when all are complete.

Until then the files are in NAME.partial, with a record for each finished file. So a killed conversion continues
where it stopped. Processes don't communicate: arithmetic assigns the files, and the records show which are done.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.weights.folder import read_marker, replace_text

STALL = 900.0  # seconds without a new byte after which the other processes count as dead
POLL = 0.2
RECORDS = ".work"


@dataclass(frozen=True, kw_only=True)
class Workers:
    """This process's number, and the number of processes."""

    rank: int
    size: int

    @classmethod
    def from_environment(cls) -> "Workers":
        return cls(rank=int(os.environ.get("RANK", 0)), size=int(os.environ.get("WORLD_SIZE", 1)))

    def mine(self, sizes: Sequence[int]) -> list[int]:
        """The indices in `sizes` for this process, in order; every process gets about the same number of bytes."""
        loads = [0] * self.size
        mine = []
        for place in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            rank = loads.index(min(loads))
            loads[rank] += sizes[place]
            if rank == self.rank:
                mine.append(place)
        return sorted(mine)


class Published(Exception):
    """The partial folder is gone, because another process completed it and gave it its name."""


class Work:
    """The output folder while it is being written; `plan` decides its contents.

    A file is finished when it has passed all of `checks`, in any run.
    """

    def __init__(self, output: Path, plan: dict[str, Any], checks: Iterable[str] = ()) -> None:
        self.output, self.plan, self.checks = real(output), json.loads(json.dumps(plan)), frozenset(checks)
        self.partial = self.output.with_name(self.output.name + ".partial")
        self.records = self.partial / RECORDS

    def is_published(self, marker: Path) -> bool:
        """Whether the output exists, made by this plan; `InputError` if it is something else."""
        if not self.output.exists():
            return False
        if not self.output.is_dir():
            raise InputError(f"{self.output}: is a file")
        if (self.output / marker).is_file():
            made_by = read_marker((self.output / marker).parent).get("conversion")
            if made_by == self.plan:
                shutil.rmtree(
                    self.output / RECORDS, ignore_errors=True
                )  # left behind by a kill just after publishing
                return True
            raise InputError(f"{self.output}: holds another conversion ({difference(self.plan, made_by)})")
        if held := next(self.output.iterdir(), None):
            raise InputError(f"{self.output}: holds something else ({held.name}); give a new folder")
        if self.output.is_mount():  # can't be replaced by the finished one
            raise InputError(f"{self.output}: is a mount point; give a new folder inside it")
        return False

    def begin(self, total: int, workers: Workers, folder: Path) -> None:
        """Make `folder` in the partial folder, or continue with it; `InputError` if it belongs to another plan, or
        the disk is full.

        The first process makes it, and the others wait.
        """
        if workers.rank > 0:
            self._wait_begun()
            return self._check_plan()
        if self._plan.exists():
            self._check_plan()
        elif self._holds_other(folder):
            raise InputError(f"{self.partial}: holds something else; move it away")
        self._check_space(total)
        self.records.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        replace_text(self._plan, json.dumps(self.plan, indent=1))
        return None

    def _holds_other(self, folder: Path) -> bool:
        """Whether the partial folder holds more than the remains of a kill before its plan was written."""
        if not self.partial.is_dir():
            return os.path.lexists(self.partial)
        return any(p.name != RECORDS and not (p == folder and not any(p.iterdir())) for p in self.partial.iterdir())

    @property
    def _plan(self) -> Path:
        return self.records / "plan.json"

    def _check_plan(self) -> None:
        try:
            other = json.loads(self._plan.read_text())
        except FileNotFoundError:
            raise Published from None
        if other != self.plan:
            found = difference(self.plan, other)
            raise InputError(f"{self.partial}: holds another conversion, unfinished ({found}); remove it")

    def _wait_begun(self) -> None:
        end = time.monotonic() + STALL
        while not self._plan.exists():
            if self.output.exists() and any(self.output.iterdir()):
                raise Published
            if time.monotonic() > end:
                raise JobError(f"{self.partial}: rank 0 hasn't begun it within {STALL:.0f} s")
            time.sleep(POLL)

    def _check_space(self, total: int) -> None:
        parent = next(p for p in self.partial.parents if p.exists())
        have = sum(_blocks(p) for p in self.partial.rglob("*"))
        free, needed = shutil.disk_usage(parent).free, max(0, total - have)
        if free < needed + needed // 100:
            raise InputError(
                f"{parent}: {needed / 1e9:.1f} GB to write and {free / 1e9:.1f} GB free; "
                "make room or give another --output"
            )

    def record(self, name: str) -> dict[str, Any] | None:
        """The record that `keep` got for the file; None if it isn't finished."""
        try:
            found: dict[str, Any] = json.loads(self._record(name).read_text())
        except FileNotFoundError:
            if not self.records.exists():
                raise Published from None
            return None
        return found if self.checks <= set(found.get("checks", ())) else None

    def _record(self, name: str) -> Path:
        return self.records / f"{name.replace('/', '_')}.json"

    def is_recorded(self, name: str) -> bool:
        """Whether the file is finished."""
        return self.record(name) is not None

    def claim(self, path: Path) -> int:
        """Open the empty, rough version of `path` for this process alone; `InputError` when another writes it."""
        rough = rough_name(path)
        while True:
            try:
                path.parent.mkdir(exist_ok=True)
                descriptor = os.open(rough, os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:
                raise Published from None
            try:
                _lock(descriptor)
                if os.fstat(descriptor).st_ino == rough.stat().st_ino:
                    os.ftruncate(descriptor, 0)
                    return descriptor
            except BlockingIOError as error:
                os.close(descriptor)
                raise InputError(
                    f"{rough}: another process is writing it: this conversion is already running"
                ) from error
            except FileNotFoundError:
                pass
            os.close(descriptor)  # it was finished and renamed between these two lines

    def keep(self, name: str, path: Path, descriptor: int, record: dict[str, Any]) -> None:
        """The rough version of file `name` is complete: sync it, rename it, then write its record."""
        os.fsync(descriptor)
        rough_name(path).rename(path)
        os.close(descriptor)
        replace_text(self._record(name), json.dumps({**record, "checks": sorted(self.checks)}))

    def wait(self, names: Sequence[str], between: Callable[[], Any]) -> None:
        """Wait until every file is finished; `JobError` if nothing more is written."""
        missing, patience = set(names), Patience(self.partial)
        while missing:
            between()
            found = {name for name in missing if self.is_recorded(name)}
            if found:
                missing -= found
            elif patience.is_out():
                raise JobError(
                    f"{self.partial}: no other process wrote anything for {STALL:.0f} s; {min(missing)} is missing"
                )
            else:
                time.sleep(POLL)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Keep telling the waiting processes that the first process is still working."""
        ended = threading.Event()

        def tell() -> None:
            while not ended.wait(STALL / 100):
                with suppress(FileNotFoundError), (self.records / "alive").open("a") as sign:
                    sign.write(".")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    def publish(self) -> None:
        """Give the complete folder its name."""
        for rough in self.partial.rglob("*.rough"):
            rough.unlink()
        self.partial.rename(self.output)
        shutil.rmtree(self.output / RECORDS, ignore_errors=True)  # other processes may be removing it already

    def wait_published(self, marker: Path, between: Callable[[], Any]) -> None:
        """Wait until the first process has published; `JobError` if it shows no sign of life."""
        patience = Patience(self.partial)
        while not (self.output / marker).exists():
            between()
            if patience.is_out():
                raise JobError(f"{self.output}: rank 0 hasn't completed it within {STALL:.0f} s")
            time.sleep(POLL)


def real(output: Path) -> Path:
    """The folder of `output`; a link is resolved, because a folder can't replace a link."""
    if "\0" in str(output):
        raise InputError(f"{str(output)!r}: not a path")
    if not output.name:
        raise InputError(f"{output}: holds something else; give a new folder")
    found = Path(os.path.realpath(output)) if output.is_symlink() else output
    if found.is_symlink():
        raise InputError(f"{output}: a link that leads to itself")
    return found


def _lock(descriptor: int) -> None:
    """Lock the file until it is closed; `BlockingIOError` if another process holds the lock.

    Some mounts of parallel file systems have no locks. There, two conversions into one folder at once aren't
    noticed.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
            raise


class Patience:
    """Notices that a folder in which others write hasn't grown for too long."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._size, self._since = self._measured(), time.monotonic()

    def is_out(self) -> bool:
        """It looks only now and then, because asking for sizes loads a network file system."""
        if time.monotonic() - self._since < STALL:
            return False
        before, self._size, self._since = self._size, self._measured(), time.monotonic()
        return self._size == before

    def _measured(self) -> int:
        with suppress(FileNotFoundError):
            return sum(p.lstat().st_size for p in self._folder.rglob("*") if not p.is_dir())
        return -1  # a file was renamed meanwhile


def _blocks(path: Path) -> int:
    """Bytes on the disk; 0 for what another process has renamed meanwhile."""
    try:
        return path.stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def rough_name(path: Path) -> Path:
    """A file's name while it is being written."""
    return path.with_name(f".{path.name}.rough")


def difference(plan: dict[str, Any], other: Any) -> str:
    """Which parts of two plans differ, in words."""
    if not isinstance(other, dict):
        return "not made by convert"
    keys = sorted(k for k in plan.keys() | other.keys() if plan.get(k) != other.get(k))
    return "other " + ", ".join(keys)
