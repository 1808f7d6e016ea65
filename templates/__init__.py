"""The parts of a job's script that come with mixlaunch, by name; `launcher.script.templates` renders them."""

import functools
from pathlib import Path

from launcher.common import quoting, words
from launcher.errors import UsageError

FOLDER = Path(__file__).parent
SUFFIX = ".sh.j2"


@functools.cache
def names() -> tuple[str, ...]:
    """Every part that a profile can replace."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}")))


def known(name: str) -> str:
    """`name` if there is such a part; `UsageError` lists those there are."""
    if name not in names():
        raise UsageError(f"no part {quoting.shown(name)}; {words.choices(name, names())}")
    return name


def source(name: str) -> str:
    """The text of a part, to copy from."""
    return (FOLDER / f"{known(name)}{SUFFIX}").read_text()
