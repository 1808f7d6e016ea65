"""Files that several commands write at once: replaced whole, and changed by one at a time.

Whoever reads a file sees the old text or the new one, never a part of either. In a folder that others may write
into no name is taken that they could have planted.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PATIENCE = 20.0  # seconds that a lock of a shared folder is waited for
POLL = 0.05


def write_json(path: Path, value: Any) -> None:
    """Put `value` in the place of what `path` held; nobody but its owner may write to it."""
    write(path, json.dumps(value, indent=1))


def write(path: Path, text: str, *, shared: bool = False) -> None:
    """Put `text` in the place of what `path` held; a link in that place is replaced, not followed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = created(temporary, mode=0o644)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            if shared:
                _share(descriptor, path.parent.stat())
            stream.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def created(path: Path, *, mode: int) -> int:
    """A new file's descriptor; `FileExistsError` for whatever is there, a link too."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)


def write_shared(path: Path, value: Any) -> None:
    """`write_json` for a file that every member of the folder may change.

    A folder with the sticky bit lets nobody replace another's file; there the file itself is written anew.
    """
    text = json.dumps(value, indent=1)
    try:
        write(path, text, shared=True)
    except PermissionError:
        if not path.parent.stat().st_mode & stat.S_ISVTX:
            raise
        _overwrite(path, text)


def _share(descriptor: int, folder: os.stat_result) -> None:
    """Let whoever may write into the folder write to the file."""
    writers = folder.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    with contextlib.suppress(OSError):  # somebody who isn't of the folder's group
        if writers & stat.S_IWGRP and os.fstat(descriptor).st_gid != folder.st_gid:
            os.fchown(descriptor, -1, folder.st_gid)
    os.fchmod(descriptor, 0o644 | writers)


def _overwrite(path: Path, text: str) -> None:
    descriptor = _plain(path, os.O_RDWR)
    try:
        data = text.encode()
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def _plain(path: Path, how: int) -> int:
    """The descriptor of a plain file that is there."""
    descriptor = os.open(path, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it isn't a plain file of one name", str(path))
    return descriptor


@contextlib.contextmanager
def locked_shared(path: Path) -> Iterator[bool | None]:
    """Hold the lock file `path` of a shared folder, made if need be; None on a file system without locks.

    Whoever holds it for long is no reason to wait for ever: `OSError`.
    """
    descriptor = _lock_file(path)
    try:
        deadline = time.monotonic() + PATIENCE
        while (held := _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)) is False:
            if time.monotonic() > deadline:
                raise OSError(errno.EAGAIN, f"another command has held {path} for {PATIENCE:g} s", str(path))
            time.sleep(POLL)
        yield held
    finally:
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    """NFS gives an exclusive lock only to who may write; elsewhere reading is enough."""
    for _ in range(3):
        try:
            return _plain(path, os.O_RDWR)
        except PermissionError:
            return _plain(path, os.O_RDONLY)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                descriptor = created(path, mode=0o600)
                _share(descriptor, path.parent.stat())
                return descriptor
    raise OSError(errno.EAGAIN, "it comes and goes", str(path))


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = True) -> Iterator[bool | None]:
    """Hold the lock of a folder or a file.

    False where another holds it and `wait` is off; None on a file system without locks.
    """
    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    # NFS gives an exclusive lock only to who may write.
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        yield _lock(descriptor, how)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, how: int) -> bool | None:
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
