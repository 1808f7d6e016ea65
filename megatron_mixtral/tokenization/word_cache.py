"""Encodes text a word at a time from a table of words already met: the very ids that SentencePiece gives the whole.

It is exact because no piece of such a vocabulary has a space after another character, nor a line's end in it: where
one begins, no two characters are ever joined, whatever stands before them. `serves` checks that.
"""

import re
from collections.abc import Callable, Iterator
from typing import Protocol

SPACE = "▁"  # SentencePiece's own sign for it
LIMIT = 1 << 17  # words kept, some 30 MB; then the table begins anew, so that memory is bounded whatever the text
LONGEST = 64  # characters of a word that is kept
STRETCH = 1 << 20  # characters, about, whose words are listed at a time
# Every character is in exactly one: a word with the spaces before it, spaces at a line's end, or ends of lines.
PARTS = re.compile(r" *[^ \n]+| +|\n+")
AFTER_A_WORD = re.compile(r"(?<=[^ \n])(?= )")

# Where a vocabulary's own ways with spaces and lines would show.
PROBES = ("", "a", " a", "a ", "a  b", "   b", "\n", "a\nb", "\n\n a\n", "a \n b", "\t a", "Ab.c, d")


class SentencePiece(Protocol):
    """What is asked of SentencePiece's processor."""

    def vocab_size(self) -> int: ...

    def id_to_piece(self, index: int) -> str: ...

    def encode(self, text: str) -> list[int]: ...


def serves(model: SentencePiece, apart: "Words | None" = None) -> bool:
    """Whether words can be encoded apart: by the vocabulary, and by what is done to text before it is looked up."""
    pieces = (model.id_to_piece(index) for index in range(model.vocab_size()))
    if any(SPACE in piece.lstrip(SPACE) or "\n" in piece for piece in pieces):
        return False
    apart = apart or Words(model)
    return all(apart.encode(text) == model.encode(text) for text in PROBES)


def spaced(text: str) -> str:
    """With the space that SentencePiece puts before every text."""
    return f" {text}"


class Words:
    """`encode` as `model.encode`, for one that `serves`.

    `inside` encodes a part in the midst of a text; `opening` is what the model makes of a text's begin.
    """

    def __init__(
        self,
        model: SentencePiece,
        inside: Callable[[str], list[int]] | None = None,
        opening: Callable[[str], str] = spaced,
    ) -> None:
        self._encode: Callable[[str], list[int]] = model.encode
        self._inside, self._opening = inside or self._between, opening
        self._line = len(model.encode("\n"))
        self._known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""
        ids: list[int] = []
        known = self._known
        begun = self._opening(text).replace(SPACE, " ") if text else ""  # the same to SentencePiece
        for stretch in _stretches(begun) if text else ():
            for part in PARTS.findall(stretch):
                found = known.get(part)
                ids += self._learn(part) if found is None else found
        return ids

    def _learn(self, part: str) -> list[int]:
        ids = self._inside(part)
        if len(part) <= LONGEST:
            if len(self._known) >= LIMIT:
                self._known.clear()
            self._known[part] = ids
        return ids

    def _between(self, part: str) -> list[int]:
        """By a model that puts a space before every text."""
        if part[0] != " ":  # nothing joins it with the end of the line before
            return self._encode("\n" + part)[self._line :]
        if part.strip(" "):
            return self._encode(part[1:])  # whose first space SentencePiece puts there
        return self._encode("a" + part)[1:]


def _stretches(text: str) -> Iterator[str]:
    """`text` in pieces that are cut between words."""
    begin = 0
    while (found := AFTER_A_WORD.search(text, begin + STRETCH)) is not None:
        yield text[begin : found.start()]
        begin = found.start()
    yield text[begin:]
