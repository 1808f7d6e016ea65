"""Reads files of folders that others may write into, and says whose a file is.

No link is followed, no FIFO or device is waited for, and nothing is read beyond its bound. What a file holds is
still its owner's word.
"""

import errno
import functools
import grp
import json
import math
import os
import pwd
import stat
from pathlib import Path
from typing import Any, BinaryIO

RECORD = 16 << 20  # bytes; more than any record that a command writes
DEPTH = 32
DIGITS = 18
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def opened(path: Path | str, *, most: int | None = None, dir_fd: int | None = None) -> BinaryIO:
    """A plain file, for reading; `OSError` for anything else and for one of more than `most` bytes."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=dir_fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            what = "a link" if error.errno == errno.ELOOP else "a socket"
            raise OSError(errno.EINVAL, f"it is {what}, not a plain file", str(path)) from None
        raise
    try:
        _require_plain(os.fstat(descriptor), str(path), most)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_plain(found: os.stat_result, path: str, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        what = KINDS.get(stat.S_IFMT(found.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {what}, not a plain file", path)
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes; at most {most} are read", path)


def read(path: Path | str, *, most: int = RECORD, dir_fd: int | None = None) -> bytes:
    """A plain file's content."""
    return read_with_owner(path, most=most, dir_fd=dir_fd)[0]


def read_with_owner(
    path: Path | str, *, most: int = RECORD, dir_fd: int | None = None
) -> tuple[bytes, os.stat_result]:
    """The same, with what tells whose it is, of the very file that was read."""
    with opened(path, most=most, dir_fd=dir_fd) as stream:
        data = stream.read(most + 1)  # it may have grown
        if len(data) > most:
            raise OSError(errno.EFBIG, f"it has more than {most} bytes", str(path))
        return data, os.fstat(stream.fileno())


def read_mine(path: Path) -> bytes:
    """Content that only this user can have written; `PermissionError` otherwise."""
    data, found = read_with_owner(path)
    if whose := stranger(found):
        raise PermissionError(errno.EPERM, f"it is {whose}", str(path))
    return data


def tail(path: Path, size: int) -> bytes:
    """The end of a plain file, of at most `size` bytes."""
    with opened(path) as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - size))
        return stream.read(size)


def stranger(found: os.stat_result) -> str:
    """Who but this user can have written it, in a few words; empty if nobody can."""
    if found.st_uid != os.geteuid():
        return f"{user(found.st_uid)}'s"
    if found.st_mode & stat.S_IWOTH:
        return "writable by everybody"
    if found.st_mode & stat.S_IWGRP and not _is_private(found.st_gid):
        return f"writable by the group {group(found.st_gid)}"
    return ""


@functools.cache
def user(uid: int) -> str:
    """A user's name, or its number."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


@functools.cache
def group(gid: int) -> str:
    """A group's name, or its number."""
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


@functools.cache
def _is_private(gid: int) -> bool:
    """Whether it is the group that many systems make for each user alone."""
    try:
        me, its = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == me.pw_gid and its.gr_name == me.pw_name and set(its.gr_mem) <= {me.pw_name}


def parsed(data: bytes | str) -> Any:
    """JSON of a bounded depth and of numbers that fit into 64 bits; `ValueError` for any other."""
    try:
        value = json.loads(data, parse_int=_int, parse_float=_float, parse_constant=_float)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        level = [inner for outer in level for inner in _inside(outer)]
    return value


def _inside(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _int(text: str) -> int:
    if len(text) > DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _float(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value
