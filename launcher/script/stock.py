"""The parts of a job's script that come with mixlaunch, by name; rendering them is the affair of `fragments`."""

import functools
from importlib import resources
from pathlib import Path

from launcher.common import quoting, words
from launcher.errors import UsageError

SUFFIX = ".sh.j2"


@functools.cache
def folder() -> Path:
    """Where they lie."""
    return Path(str(resources.files("launcher.templates")))


@functools.cache
def names() -> tuple[str, ...]:
    """Every part that a profile can replace."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in folder().glob(f"*{SUFFIX}")))


def known(name: str) -> str:
    """`name` if there is such a part; `UsageError` lists those there are."""
    if name not in names():
        raise UsageError(f"no part {quoting.shown(name)}; {words.choices(name, names())}")
    return name


def source(name: str) -> str:
    """The text of a part, to copy from."""
    return (folder() / f"{known(name)}{SUFFIX}").read_text()
