"""How large a request can be that this model could answer: what is larger is refused before anything reads it.

A context of so many tokens holds so many characters; what JSON adds to them is known. So a small model's server
has no use for megabytes, and nobody can keep it busy with them.
"""

import re
from dataclasses import dataclass

from megatron_mixtral.serve.http.errors import Problem
from megatron_mixtral.serve.http.schema import MOST_PROMPTS
from megatron_mixtral.tokenization.tokenizer import Tokenizer

ESCAPED = 6  # bytes of a character that JSON writes as \uXXXX
AROUND = 128 * 1024  # bytes of settings, of roles and of names around the text
USUAL = 8  # bytes of a token, on average, where many prompts come at once
MOST_AT_ONCE = 4 * 1024 * 1024  # bytes of many prompts
MOST_FIELDS = 65_536  # of objects, and lists and objects themselves: they take time to read however short they are
MOST_TEXTS = 2 * MOST_FIELDS  # names of fields are texts, too
OF_MANY = ("/v1/completions", "/api")  # the routes that take several prompts in one body
STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """What one request may hold."""

    context: int  # tokens
    longest: int  # characters of a token

    @property
    def text(self) -> int:
        """Characters of one prompt."""
        return self.context * self.longest

    @property
    def values(self) -> int:
        """Numbers, texts and the like of one request: the ids of as many prompts as there may be, and the rest."""
        return MOST_PROMPTS * self.context + MOST_FIELDS

    def body(self, path: str) -> int:
        """Bytes of a request to `path`."""
        one = self.text * ESCAPED
        many = min(MOST_PROMPTS * self.context * USUAL, MOST_AT_ONCE)
        return AROUND + (max(one, many) if path in OF_MANY else one)


def of(tokenizer: Tokenizer, context: int) -> Bounds:
    """What a prompt of `context` tokens of this vocabulary can be."""
    longest = max(len(tokenizer.piece(index)) for index in range(tokenizer.vocab_size))
    return Bounds(context=context, longest=longest)


def check_fields(body: bytes, bounds: Bounds) -> None:
    """400 for a body of too many values; JSON isn't read for it, and few bodies are looked at twice."""
    for marks, most in ((b":[{", MOST_FIELDS), (b",", bounds.values)):
        if _count(body, marks) > most:
            bare, texts = STRING.subn(b"", body, count=MOST_TEXTS)
            if texts == MOST_TEXTS or _count(bare, marks) > most:
                raise Problem(400, f"the body has more than {most} values", code="body_too_large")


def _count(body: bytes, marks: bytes) -> int:
    return sum(map(body.count, marks))
