"""Copies of run directories on a cluster behind a login node; they hold only small files.

The path of a copy tells where its original is, so readers of run directories need no other information. Copies are
updated whenever runs are looked up. Weights, checkpoints and secrets are never copied.
"""

import contextlib
import functools
import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

from launcher.common import files, state_dir
from launcher.errors import Fault
from launcher.host import ssh
from launcher.host.base import MissingError
from launcher.host.ssh import Login
from megatron_mixtral.spec import rundir

RECORD = ".login"
LIST = (  # what a list of runs shows
    *("/*/", *(f"/*/{name}" for name in (rundir.RECORD, rundir.SERVER, rundir.EVENTS))),
    *(
        "/*/logs/",
        "/*/logs/slurm-*.out",
        "/*/logs/attempt_*/",
        "/*/logs/attempt_*/batch.log",
        "/*/logs/attempt_*/first_exit",
    ),
)
# Folders and records that somebody else owns or may write to, but for the group that is the user's alone.
STRANGERS = r"""
cd {root} 2>/dev/null || exit 0
private=
[ "$(id -gn)" != "$(id -un)" ] || private="! -group $(id -g)"
find . -path './*/*' ! -name run.json -prune -o \( -path './*/run.json' -o ! -name . -type d \) \
  \( ! -user "$(id -u)" -o -perm -0002 -o -perm -0020 $private \) -print0 2>/dev/null
find . -prune -print0 >/dev/null
"""
HEAVY = (f"/{rundir.CHECKPOINTS}/", f"/{rundir.SECRETS}", "/inputs/", "/submission/", "*.distcp", "*.safetensors")


def place(login: Login, path: Path) -> Path:
    """Where the copy of a login node's path lies."""
    folder = _folder(login)
    if not (folder / RECORD).exists():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / RECORD).write_text(login.encoded())
    return folder / path.relative_to("/")


def login_of(path: Path) -> Login | None:
    """The login node that `path` is a copy from; None for a path of this machine."""
    parts = _below(path)
    return _login(_home() / parts[0]) if parts else None


def original(path: Path) -> Path:
    """The path that a copy has on its cluster; any other is its own original."""
    return Path("/", *_below(path)[1:]) if login_of(path) else path


def pull(login: Login, root: Path) -> None:
    """Bring the copies of all runs below `root` up to date."""
    rules = [*(f"--include={rule}" for rule in LIST), "--exclude=*"]
    _copy(login, root, rules, root=root)
    _note_strangers(login, root)


def refresh(login: Login, run: Path) -> None:
    """Bring one run's copy up to date, every log of it."""
    _copy(login, run, [f"--exclude={rule}" for rule in HEAVY], root=run.parent)
    _note_strangers(login, run.parent)


def stranger(login: Login, run: Path) -> str:
    """Who else can have written the original of a copy; empty for a run of one's own."""
    notes = _strangers(login, run.parent)
    with contextlib.suppress(OSError):
        return "another user's" if run.name in _names(notes, notes.stat().st_mtime_ns) else ""
    return ""


@functools.lru_cache(maxsize=8)
def _names(notes: Path, _changed: int) -> frozenset[str]:
    return frozenset(json.loads(notes.read_text()))


def _note_strangers(login: Login, root: Path) -> None:
    """Copies are all ours; whose the originals are is noted beside them."""
    done = ssh.run(login, STRANGERS.format(root=shlex.quote(str(original(root)))))
    if done.code:
        raise Fault(f"login node {login.host}: it can't say whose the runs in {original(root)} are: {done.said}")
    names = sorted({path.split("/")[1] for path in done.out.split("\0") if path.startswith("./")})
    files.write_json(_strangers(login, root), names)


def _strangers(login: Login, root: Path) -> Path:
    return _folder(login) / f".strangers-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}"


def read(login: Login, path: Path) -> bytes:
    """The content of a copy's original, of which nothing stays here; `FileNotFoundError`, `OSError`."""
    name = shlex.quote(str(original(path)))
    done = ssh.run(login, f"[ -e {name} ] || exit 66; exec cat {name}")
    if done.code == 66:
        raise FileNotFoundError(2, "No such file or directory", str(original(path)))
    if done.code:
        raise OSError(done.said)
    return done.out.encode()


@contextlib.contextmanager
def submitting(run: Path) -> Iterator[None]:
    """During this block the copy `run` isn't treated as one whose original was removed."""
    run.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with files.locked(run.parent, shared=True):
        yield


def _copy(login: Login, folder: Path, rules: list[str], *, root: Path) -> None:
    """Make `folder` as its original is, by `rules`. Nothing is removed here while a run is being submitted."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # with `root`, which is it or above it
    with contextlib.suppress(MissingError), files.locked(root, wait=False) as alone:
        removing = ["--delete"] if alone else []
        ssh.rsync(login, "-rt", *removing, *rules, ssh.far(login, f"{original(folder)}/"), f"{folder}/")


def is_known(login: Login) -> bool:
    """Whether this machine has ever asked about runs there."""
    return _folder(login).is_dir()


def _below(path: Path) -> tuple[str, ...]:
    """The parts of a path below the folder of all copies."""
    copies = _home()
    return path.relative_to(copies).parts if path.is_relative_to(copies) else ()


def _home() -> Path:
    return state_dir.state().resolve() / "remote"


def _folder(login: Login) -> Path:
    """Two clusters may share a host's name and differ in a port."""
    options = hashlib.sha256(login.encoded().encode()).hexdigest()[:8]
    return _home() / (f"{login.host}-{options}" if login.options else login.host)


def _login(folder: Path) -> Login | None:
    with contextlib.suppress(FileNotFoundError):
        return Login.decoded((folder / RECORD).read_text())
    return None
