"""Tokens as a reader sees them: what is learnt stands between guillemets, and control tokens have a colour.

The plain text of a document names each token; a second line has the ids.
"""

from collections.abc import Iterator, Sequence

from megatron_mixtral.tokenization.tokenizer import Tokenizer

LEARNT, CONTROL, OFF = "\x1b[32m", "\x1b[35;1m", "\x1b[0m"


def pieces(words: Tokenizer, ids: Sequence[int], mask: Sequence[int], *, colour: bool = False) -> str:
    """The tokens' names."""
    return _marked([words.piece(index) or f"<{index}>" for index in ids], words, ids, mask, colour)


def numbers(words: Tokenizer, ids: Sequence[int], mask: Sequence[int], *, colour: bool = False) -> str:
    """The tokens' ids."""
    return _marked([str(index) for index in ids], words, ids, mask, colour)


def _marked(shown: list[str], words: Tokenizer, ids: Sequence[int], mask: Sequence[int], colour: bool) -> str:
    control = set(words.control.values())
    text = ""
    for begin, end in _runs(mask):
        parts = [
            _coloured(shown[n], bool(mask[n]), ids[n] in control) if colour else shown[n] for n in range(begin, end)
        ]
        text += f"«{' '.join(parts)}»" if mask[begin] else " ".join(parts)
    return text


def _coloured(text: str, learnt: bool, control: bool) -> str:
    return f"{CONTROL if control else LEARNT}{text}{OFF}" if learnt or control else text


def _runs(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    begin = 0
    for at in range(1, len(mask) + 1):
        if at == len(mask) or bool(mask[at]) != bool(mask[begin]):
            yield begin, at
            begin = at
