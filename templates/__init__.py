"""The parts of a job's script that come with mixlaunch, by name; `launcher.script.templates` renders them."""

import functools
from pathlib import Path

from launcher.common import quoting, words
from launcher.errors import UsageError

FOLDER = Path(__file__).parent
SUFFIX = ".sh.j2"
FORMER = {"again_slurm": "requeue_slurm", "again_local": "requeue_local"}  # names that profiles may still say


@functools.cache
def names() -> tuple[str, ...]:
    """Every part that a profile can replace."""
    return tuple(sorted(path.name.removesuffix(SUFFIX) for path in FOLDER.glob(f"*{SUFFIX}")))


def known(name: str) -> str:
    """The part that is called `name` or was once; `UsageError` lists those there are."""
    name = FORMER.get(name, name)
    if name not in names():
        raise UsageError(f"no part {quoting.shown(name)}; {words.choices(name, names())}")
    return name


def source(name: str) -> str:
    """The text of a part, to copy from."""
    return (FOLDER / f"{known(name)}{SUFFIX}").read_text()
