"""Slurm's notation for many nodes, `gpu[01-04,7],login`: expanded to names, and compressed again (pure).

Only what squeue, sacct and people write: pairs of brackets, numbers in them with or without leading zeros.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

from launcher.common import quoting
from launcher.errors import UsageError

PLAIN, RANGES = r"[^\[\],\s]", r"\[[\d,\s-]+\]"
PART = re.compile(rf"{PLAIN}*({RANGES}{PLAIN}*)?|{PLAIN}+({RANGES}{PLAIN}*)+")
BRACKETS = re.compile(r"\[([^\]]*)\]")
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")
MOST = 100_000


def expand(text: str) -> list[str]:
    """Single names, in order and each once; `UsageError` for what isn't a list of hosts."""
    names: list[str] = []
    for part in _parts(text):
        if not PART.fullmatch(part):
            raise UsageError(f"{text!r}: {part!r} isn't a host or hosts; such as gpu07 or gpu[01-04,7]")
        for name in _names(part, text):
            names.append(name)
            if len(names) > MOST:
                raise UsageError(f"{quoting.shown(text)}: more than {MOST} nodes")
    for name in names:
        if not NAME.fullmatch(name):
            raise UsageError(f"{text!r}: {name!r} isn't the name of a host")
    return list(dict.fromkeys(names))


def of_option(option: str, values: Iterable[str]) -> list[str]:
    """What was typed for `option`, maybe in several pieces, as single names."""
    try:
        return expand(",".join(values))
    except UsageError as error:
        raise UsageError(f"{option}: {error}") from None


def compress(names: Iterable[str]) -> str:
    """The short form, sorted: `gpu[01-03],login`."""
    split = {name: re.fullmatch(r"(.*?)(\d{1,9})", name) for name in set(names)}
    numbered = [(match[1], match[2]) for match in split.values() if match]
    padded = {(head, len(digits)) for head, digits in numbered if digits[0] == "0" and len(digits) > 1}
    groups: dict[tuple[str, int], list[int]] = {}
    for head, digits in numbered:
        width = len(digits) if (head, len(digits)) in padded else 0
        groups.setdefault((head, width), []).append(int(digits))
    plain = [name for name, match in split.items() if not match]
    return ",".join(sorted([*plain, *(_group(head, width, found) for (head, width), found in groups.items())]))


def spans(numbers: Iterable[int]) -> str:
    """`0-3,7` of 0, 1, 2, 3, 7."""
    return ",".join(_span(low, high, 0) for low, high in _runs(sorted(set(numbers))))


def _parts(text: str) -> list[str]:
    """At the commas that aren't in brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _names(part: str, text: str) -> Iterator[str]:
    """Every name of `rack[0-1]-node[1-2]`, the last pair of brackets running first."""
    pieces = BRACKETS.split(part)  # what is between brackets, and every other one what is in them
    ranges = [[piece] if place % 2 == 0 else list(_numbers(piece, text)) for place, piece in enumerate(pieces)]
    return map("".join, itertools.product(*ranges))


def _numbers(ranges: str, text: str) -> Iterator[str]:
    for item in ranges.split(","):
        first, _, last = item.strip().partition("-")
        if not all(re.fullmatch(r"[0-9]{1,9}", number) for number in (first, last or first)):
            raise UsageError(f"{quoting.shown(text)}: {quoting.shown(item)} isn't a number or a range of them")
        low, high = int(first), int(last or first)
        if not 0 <= high - low < MOST:
            raise UsageError(f"{quoting.shown(text)}: {item!r} isn't a range of at most {MOST} nodes")
        yield from (f"{number:0{len(first)}d}" for number in range(low, high + 1))


def _group(head: str, width: int, numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"{head}{numbers[0]:0{width}d}"
    return f"{head}[{','.join(_span(low, high, width) for low, high in _runs(sorted(numbers)))}]"


def _runs(numbers: list[int]) -> list[tuple[int, int]]:
    """First and last of each unbroken row."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


def _span(low: int, high: int, width: int) -> str:
    return f"{low:0{width}d}" if low == high else f"{low:0{width}d}-{high:0{width}d}"
