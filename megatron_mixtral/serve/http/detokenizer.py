"""Tokens to text as they arrive, and where to stop: what a reader sees of one answer.

Joined pieces are always exactly the decoded whole: half a character, or the start of what may become a stop
string, is held back until the next token settles it.
"""

from dataclasses import dataclass, field

from megatron_mixtral.tokenization.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder shows for the first bytes of a longer character
CONTEXT = 6  # prompt tokens that decide how the first new one reads (its leading space)


class Detokenizer:
    """Decodes one token at a time; `context` is what the new text will stand behind, empty for a fresh answer."""

    def __init__(self, tokenizer: Tokenizer, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = self._readable(context)[-CONTEXT:]
        self._start = 0  # where the window of context begins
        self._shown = len(self._ids)  # how many of the ids are text already

    def push(self, token: int) -> str:
        """The text that `token` settles; empty while a character is incomplete."""
        self._ids += self._readable([token])
        whole = self._tokenizer.decode(self._ids[self._start :])
        return "" if whole.endswith(UNFINISHED) else self._settle(whole)

    def flush(self) -> str:
        """Whatever is left at the end, broken characters and all."""
        return self._settle(self._tokenizer.decode(self._ids[self._start :]))

    def _settle(self, whole: str) -> str:
        """Both decodings begin at the same id, so the longer one begins with the shorter."""
        known = self._tokenizer.decode(self._ids[self._start : self._shown])
        if len(self._ids) > self._shown:
            self._start, self._shown = self._shown, len(self._ids)
        return whole[len(known) :]

    def _readable(self, ids: list[int]) -> list[int]:
        return readable(self._tokenizer, ids)


def readable(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Without control tokens, and without the ids that only pad the model's vocabulary."""
    return [i for i in ids if i < tokenizer.vocab_size and i not in tokenizer.silent]


@dataclass(slots=True)
class StopStrings:
    """Passes text through until one of `stops` appears; that and all behind it is cut."""

    stops: list[str]
    held: str = ""
    hit: str | None = field(default=None)

    def push(self, text: str) -> str:
        """What may be shown of `text` and what was held; sets `hit` at the first stop string."""
        self.held += text
        found = [(self.held.index(stop), stop) for stop in self.stops if stop in self.held]
        if found:
            at, self.hit = min(found)
            shown, self.held = self.held[:at], ""
            return shown
        keep = max((self._overlap(stop) for stop in self.stops), default=0)
        cut = len(self.held) - keep
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def flush(self) -> str:
        shown, self.held = self.held, ""
        return shown

    def _overlap(self, stop: str) -> int:
        """How much of the end of what is held could be the beginning of `stop`."""
        longest = min(len(stop) - 1, len(self.held))
        return next((n for n in range(longest, 0, -1) if self.held.endswith(stop[:n])), 0)
