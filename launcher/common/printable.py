"""Prints text that others may have written: everything of it but the characters that steer a terminal.

Escape sequences move the cursor, retitle windows and fill clipboards; overrides of the writing direction make text
look like another.
"""

import json
import re
import sys
from typing import Any

COLOUR = r"\x1b\[[0-9;:]{0,32}m"
# C0 but tab and newline, DEL, C1, marks and overrides of direction, line and paragraph separators, lone surrogates.
STEERING = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
    r"\ufff9-\ufffb\U000e0001\U000e0020-\U000e007f"
)
MARK = "?"  # which every terminal has
_STEERING = re.compile(f"[{STEERING}]")
_COLOUR = re.compile(COLOUR)


def clean(text: str) -> str:
    """`text` with a mark in the place of each such character; colours are left out."""
    if _STEERING.search(text) is None:
        return text
    return _STEERING.sub(MARK, _COLOUR.sub("", text.replace("\r\n", "\n")))


def line(text: str) -> str:
    """`clean` text that stays on one line."""
    return clean(text.replace("\n", MARK))


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON of the same value without such a character."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return _STEERING.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return json.dumps(match[0])[1:-1]


def out(text: str = "", *, end: str = "\n", err: bool = False) -> None:
    """Print cleaned text on stdout or stderr at once, without colour and wrapping."""
    print(clean(text), end=end, flush=True, file=sys.stderr if err else sys.stdout)
