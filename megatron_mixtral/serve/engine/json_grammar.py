"""JSON as it is written token by token: which tokens may come next so that what stands there can become an object.

A state says all that matters of the bytes so far; `step` gives the next one, or None for a byte that no JSON has
there. Whoever draws tokens asks `Writer.fits` and draws again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.tokenization import token_text
from megatron_mixtral.tokenization.tokenizer import Tokenizer

BLANKS = b" \t\r\n"
MOST_BLANKS = 40  # in a row: a model may else indent for ever
DEEPEST = 64
DIGITS = b"0123456789"
LITERALS = {ord("t"): b"rue", ord("f"): b"alse", ord("n"): b"ull"}
NUMBER_ENDS = ("zero", "int", "fraction", "exponent")
# Inside a number: mode -> (bytes, next mode).
NUMBER: dict[str, tuple[tuple[bytes, str], ...]] = {
    "minus": ((b"0", "zero"), (b"123456789", "int")),
    "zero": ((b".", "point"), (b"eE", "e")),
    "int": ((DIGITS, "int"), (b".", "point"), (b"eE", "e")),
    "point": ((DIGITS, "fraction"),),
    "fraction": ((DIGITS, "fraction"), (b"eE", "e")),
    "e": ((b"+-", "sign"), (DIGITS, "exponent")),
    "sign": ((DIGITS, "exponent"),),
    "exponent": ((DIGITS, "exponent"),),
}
# The first bytes of longer characters: range of the first -> (how many follow, range of the next one).
UTF8 = (
    (0xC2, 0xDF, 1, 0x80, 0xBF),
    (0xE0, 0xE0, 2, 0xA0, 0xBF),
    (0xE1, 0xEC, 2, 0x80, 0xBF),
    (0xED, 0xED, 2, 0x80, 0x9F),
    (0xEE, 0xEF, 2, 0x80, 0xBF),
    (0xF0, 0xF0, 3, 0x90, 0xBF),
    (0xF1, 0xF3, 3, 0x80, 0xBF),
    (0xF4, 0xF4, 3, 0x80, 0x8F),
)


@dataclass(frozen=True, slots=True)
class State:
    """`open` are the brackets that aren't closed, `data` what the mode itself remembers."""

    mode: str = "start"
    open: bytes = b""
    key: bool = False  # a string that names a member
    data: Any = None
    blanks: int = 0

    @property
    def complete(self) -> bool:
        """The object is closed."""
        return self.mode == "after" and not self.open


def step(state: State, byte: int) -> State | None:
    """The state after one more byte; None where none may stand there."""
    mode, stack = state.mode, state.open
    if mode == "string":
        return _in_string(state, byte)
    if mode in ("escape", "hex", "character"):
        return _in_character(state, byte)
    if mode == "literal":
        rest = state.data
        return (
            None
            if byte != rest[0]
            else State("literal", stack, data=rest[1:])
            if rest[1:]
            else State("after", stack)
        )
    if mode in NUMBER:
        for some, following in NUMBER[mode]:
            if byte in some:
                return State(following, stack)
        return step(State("after", stack), byte) if mode in NUMBER_ENDS else None
    if byte in BLANKS:
        blanks = state.blanks + 1
        return State(mode, stack, blanks=blanks) if blanks <= MOST_BLANKS else None
    return _between(mode, stack, byte)


def _between(mode: str, stack: bytes, byte: int) -> State | None:
    """Where a value, a name, a separator or an end may stand."""
    if mode == "start":
        return State("first key", b"{") if byte == ord("{") else None
    if mode in ("first key", "key") and byte == ord('"'):
        return State("string", stack, key=True)
    if mode == "colon":
        return State("value", stack) if byte == ord(":") else None
    if (mode == "first key" and byte == ord("}")) or (mode == "first value" and byte == ord("]")):
        return State("after", stack[:-1])
    if mode == "after" and stack:
        inside_object = stack[-1:] == b"{"
        if byte == ord(","):
            return State("key" if inside_object else "value", stack)
        return State("after", stack[:-1]) if byte == ord("}" if inside_object else "]") else None
    return _value(stack, byte) if mode in ("value", "first value") else None


def _value(stack: bytes, byte: int) -> State | None:
    """The first byte of a value."""
    if byte == ord('"'):
        return State("string", stack)
    if byte in b"{[":
        inner = State("first key" if byte == ord("{") else "first value", stack + bytes([byte]))
        return inner if len(inner.open) <= DEEPEST else None
    if byte in LITERALS:
        return State("literal", stack, data=LITERALS[byte])
    if byte == ord("-"):
        return State("minus", stack)
    return step(State("minus", stack), byte) if byte in DIGITS else None


def _in_string(state: State, byte: int) -> State | None:
    if byte == ord('"'):
        return State("colon" if state.key else "after", state.open)
    if byte == ord("\\"):
        return State("escape", state.open, state.key)
    if byte < 0x80:
        return state if byte >= 0x20 else None
    for first, last, count, low, high in UTF8:
        if first <= byte <= last:
            return State("character", state.open, state.key, (count, low, high))
    return None


def _in_character(state: State, byte: int) -> State | None:
    """Behind a backslash, or behind the first byte of a longer character."""
    inside = State("string", state.open, state.key)
    if state.mode == "escape":
        if byte == ord("u"):
            return State("hex", state.open, state.key, 4)
        return inside if byte in b'"\\/bfnrt' else None
    if state.mode == "hex":
        if byte not in b"0123456789abcdefABCDEF":
            return None
        return State("hex", state.open, state.key, state.data - 1) if state.data > 1 else inside
    count, low, high = state.data
    if not low <= byte <= high:
        return None
    return State("character", state.open, state.key, (count - 1, 0x80, 0xBF)) if count > 1 else inside


class Writer:
    """One answer on its way: told every token, asked about the next."""

    def __init__(self, tokens: Sequence[bytes | None], ends: Sequence[int]) -> None:
        self._tokens, self._ends = tokens, ends
        self.state = State()

    def fits(self, token: int) -> bool:
        """An end token once the object is closed, and nothing else then."""
        if self.state.complete:
            return token in self._ends
        return self._after(token) is not None

    def take(self, token: int) -> None:
        if not self.state.complete:
            after = self._after(token)
            assert after is not None, "it was asked whether the token fits"
            self.state = after

    def _after(self, token: int) -> State | None:
        content = self._tokens[token] if token < len(self._tokens) else None
        state: State | None = self.state if content else None
        for byte in content or b"":
            if state is None or state.complete:  # nothing may follow the object in its last token
                return None
            state = step(state, byte)
        return state


def token_bytes(tokenizer: Tokenizer) -> list[bytes | None]:
    """What each token adds to the text; None for those that are no text."""
    silent = tokenizer.silent
    pieces = range(tokenizer.vocab_size)
    return [
        None if n in silent or _is_control(tokenizer.piece(n)) else bytes(token_text.token_bytes(tokenizer, n))
        for n in pieces
    ]


def _is_control(piece: str) -> bool:
    """`<unk>` and its like; `<0x0A>` is a byte."""
    return len(piece) > 2 and piece[0] == "<" and piece[-1] == ">" and not piece.startswith("<0x")
