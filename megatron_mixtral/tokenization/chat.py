"""Conversations to token ids with a loss mask: exactly the assistant's words and its end token are learnt.

The `[INST]` form is token for token that of mistral-common's v1, the one Mixtral 8x7B Instruct was trained with.
"""

import itertools
from collections.abc import Iterable
from typing import Any, Protocol

from megatron_mixtral.tokenization.tokenizer import Tokenizer

Turn = tuple[str, str]  # role, content
ROLES = ("system", "user", "assistant")


def from_messages(messages: Any, *, blank: bool = False) -> list[Turn]:
    """Check and normalise a `messages` list; `ValueError` says what is wrong with it.

    As in mistral-common: neighbours of one role are joined, and the system's words open the first user turn. A turn
    without words is refused unless `blank`: it teaches nothing.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages isn't a non-empty list")
    turns = _joined(_turn(message, index, blank) for index, message in enumerate(messages))
    if any(before[0] == "assistant" and turn[0] == "system" for before, turn in itertools.pairwise(turns)):
        raise ValueError("a system message after an answer: Mixtral's form has no place for it")
    system = "\n\n".join(content for role, content in turns if role == "system")
    turns = [turn for turn in turns if turn[0] != "system"]
    if not turns or turns[0][0] != "user":
        raise ValueError("the first turn after the system's must be the user's")
    if turns[-1][0] != "assistant":
        raise ValueError("the last turn must be the assistant's: there is nothing to learn after a question")
    if system:
        turns[0] = ("user", f"{system}\n\n{turns[0][1]}")
    return turns


def encode(tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Ids and mask (1 = learn) of `<s> [INST] question [/INST] answer</s> [INST] ...`."""
    ids, mask = [tokenizer.bos], [0]
    for role, content in turns:
        learnt = role == "assistant"
        new = tokenizer.encode(content if learnt else f"[INST] {content} [/INST]")
        new = [*new, tokenizer.eos] if learnt else new
        ids += new
        mask += [int(learnt)] * len(new)
    return ids, mask


def _turn(message: Any, index: int, blank: bool) -> Turn:
    content = _text(message.get("content")) if isinstance(message, dict) else None
    if content is None:
        raise ValueError(f"messages[{index}] isn't an object with a text `content`")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"messages[{index}]: role {role!r} isn't one of {', '.join(ROLES)}")
    if not (blank or content.strip()):
        raise ValueError(f"messages[{index}]: the {role}'s content is empty")
    return role, content


def _text(content: Any) -> str | None:
    """Text as it is or in parts, which mistral-common sets apart by a line; None for all else."""
    if isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) and content else [None]
    if all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        return "\n\n".join(part["text"] for part in parts)
    return None


def _joined(turns: Iterable[Turn]) -> list[Turn]:
    joined: list[Turn] = []
    for role, content in turns:
        if joined and joined[-1][0] == role:
            joined[-1] = (role, f"{joined[-1][1]}\n\n{content}")
        else:
            joined.append((role, content))
    return joined


class Form(Protocol):
    """A way to write conversations; `source` is its Jinja template, if it has one."""

    @property
    def source(self) -> str | None: ...

    def from_messages(self, messages: Any) -> list[Turn]:
        """Checked and in turns, the assistant's being learnt; `ValueError` says what is wrong."""

    def question(self, messages: list[dict[str, Any]]) -> list[Turn]:
        """The turns up to where the assistant speaks."""

    def encode(self, tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Ids and mask."""


class Instruct:
    """Mixtral's own form."""

    source: str | None = None
    from_messages = staticmethod(from_messages)
    encode = staticmethod(encode)

    @staticmethod
    def question(messages: list[dict[str, Any]]) -> list[Turn]:
        return from_messages([*messages, {"role": "assistant", "content": "."}], blank=True)[:-1]
