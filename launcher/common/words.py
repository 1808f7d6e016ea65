"""Numbers, times and names as people read them: `1h20`, `12.3k`, `3 nodes`, `exit 137, SIGKILL` (pure).

The proposals for a mistyped name are made here as well, so that every message offers them in one way.
"""

import datetime
import difflib
import signal
from collections.abc import Iterable


def duration(seconds: float) -> str:
    """`3d`, `5h`, `12m`, `40s`; two parts below ten hours, where the second one matters: `1h20`."""
    seconds = max(seconds, 0)
    if seconds >= 86400:
        return f"{seconds / 86400:.0f}d"
    if seconds >= 3600:
        hours, minutes = divmod(int(seconds) // 60, 60)
        return f"{hours}h{minutes:02d}" if hours < 10 else f"{hours}h"
    return f"{seconds // 60:.0f}m" if seconds >= 60 else f"{seconds:.0f}s"


def age(created: str) -> str:
    """How long ago that was, as `duration` says it."""
    then = datetime.datetime.fromisoformat(created).astimezone()
    return duration((datetime.datetime.now().astimezone() - then).total_seconds())


def moment(text: str) -> str:
    """Slurm's time without what is clear: the date of today, the seconds."""
    try:
        then = datetime.datetime.fromisoformat(text)
    except ValueError:
        return text
    today = then.date() == datetime.date.today()
    return f"{then:%H:%M}" if today else f"{then:%a %d %b %H:%M}"


def code_in_words(code: int) -> str:
    """`exit 1`, or the signal that ended it: `exit 137, SIGKILL`."""
    number = code - 128 if 128 < code < 160 else 0
    try:
        return f"exit {code}, {signal.Signals(number).name}" if number else f"exit {code}"
    except ValueError:
        return f"exit {code}"


def count(number: float) -> str:
    """`12.3k`, `4.5G`: as much as one reads at a glance."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def plural(number: int, what: str) -> str:
    """`1 node`, `3 nodes`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def nearest(name: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6) -> list[str]:
    """The known names that are most like `name`, the likeliest first."""
    return difflib.get_close_matches(name, list(known), n=most, cutoff=cutoff)


def choices(name: str, known: Iterable[str]) -> str:
    """What to say after a name that isn't known: the one that was probably meant, and all there are."""
    known = list(known)
    listed = ", ".join(known) or "none"
    near = nearest(name, known)
    return f"did you mean {near[0]!r}? There are: {listed}" if near else f"there are: {listed}"
