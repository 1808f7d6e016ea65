"""What fields a JSON record must have: the first field that doesn't fit is named (pure)."""

import datetime
import re
from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]
LONGEST = 65_536
FIRST_YEAR, LAST_YEAR = 2000, 2200


def misfit(value: Any, required: Mapping[str, Check], optional: Mapping[str, Check] = {}) -> str:
    """What is wrong with an object, such as "jobs"; empty if nothing is."""
    if not isinstance(value, dict):
        return "it isn't an object"
    for name, check in required.items():
        if name not in value:
            return f"{name} is missing"
        if not check(value[name]):
            return f"{name} is wrong"
    wrong = [name for name, check in optional.items() if name in value and not check(value[name])]
    return f"{wrong[0]} is wrong" if wrong else ""


def text(value: Any) -> bool:
    """Text of a sane length that can be part of an argument."""
    return isinstance(value, str) and len(value) <= LONGEST and "\0" not in value


def matching(pattern: str) -> Check:
    """Text of that pattern."""
    compiled = re.compile(pattern, re.ASCII)
    return lambda value: isinstance(value, str) and compiled.fullmatch(value) is not None


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def whole(value: Any) -> bool:
    """An integer from 0 on."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def count(value: Any) -> bool:
    """An integer from 1 on that can be one of nodes or processes."""
    return whole(value) and 1 <= value <= 10_000_000


def number(value: Any) -> bool:
    """A number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def moment(value: Any) -> bool:
    """ISO text of a year that a clock may show; without a time zone it is this machine's time."""
    try:
        return FIRST_YEAR <= datetime.datetime.fromisoformat(value).year <= LAST_YEAR
    except (ValueError, TypeError):
        return False


def maybe(check: Check) -> Check:
    """That, or null."""
    return lambda value: value is None or check(value)


def either(*checks: Check) -> Check:
    """One of them."""
    return lambda value: any(check(value) for check in checks)


def each(check: Check, most: int = 100_000) -> Check:
    """A list of such values."""
    return lambda value: isinstance(value, list) and len(value) <= most and all(map(check, value))


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] = {}) -> Check:
    """An object of such fields."""
    return lambda value: not misfit(value, required, optional)


def object_(value: Any) -> bool:
    """Any object."""
    return isinstance(value, dict)
