"""Conversations to token ids with a loss mask, by Mistral's own forms: answers are learnt, each with its end token.

Ids are token for token those of mistral-common: its v1, which Mixtral 8x7B Instruct was trained with, and for a
tokenizer that has `[INST]` as a token its v3, which is 8x22B's.
"""

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, Protocol

from megatron_mixtral.tokenization import messages as checks
from megatron_mixtral.tokenization.messages import Message
from megatron_mixtral.tokenization.tokenizer import Tokenizer

Written = tuple[list[int], list[int]]  # ids, and of each whether it is learnt
Tools = list[dict[str, Any]] | None
ROLES = ("system", "user", "assistant")  # of the v1 form, which has no tools
INST = "[INST]"
CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")


class Form(Protocol):
    """A way to write conversations; `source` is its Jinja template, if it has one."""

    @property
    def source(self) -> str | None: ...

    @property
    def name(self) -> str:
        """As it is told."""

    def example(self, messages: Any, tools: Any = None) -> Written:
        """Ids and mask of a conversation; `ValueError` says what is wrong with it."""

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        """Ids up to where the assistant speaks."""


def own(tokenizer: Tokenizer) -> "V1 | V3":
    """Mistral's own form for this tokenizer."""
    return V3(tokenizer) if is_v3(tokenizer) else V1(tokenizer)


def is_v3(tokenizer: Tokenizer) -> bool:
    return INST in tokenizer.control


class V1:
    """`<s> [INST] question [/INST] answer</s> [INST] ...`, the brackets in characters, the system's words first."""

    source: str | None = None
    name = "Mistral's own form, mistral-common's v1"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def example(self, messages: Any, tools: Any = None) -> Written:
        found = self._turns(checks.checked(messages, roles=ROLES), tools)
        if found[-1]["role"] != "assistant":
            raise ValueError("the last turn must be the assistant's: there is nothing to learn after a question")
        checks.require_answers(found)
        return self._encode(found)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        found = self._turns(checks.checked(messages, roles=ROLES, blank=True), tools)
        if found[-1]["role"] != "user":
            raise ValueError("the last message must be the user's")
        return self._encode(found)[0]

    def _turns(self, messages: list[Message], tools: Any) -> list[Message]:
        if checks.tools_of(tools):
            raise ValueError("tools: Mistral's v1 form has no place for them")
        if bad := next((n for n, message in enumerate(messages) if "tool_calls" in message), None):
            raise ValueError(f"messages[{bad}]: tool_calls: Mistral's v1 form has no place for them")
        system, turns = _apart(messages)
        if system:
            turns[0] = turns[0] | {"content": f"{system}\n\n{turns[0]['content']}"}
        return turns

    def _encode(self, turns: list[Message]) -> Written:
        ids, mask = [self._tokenizer.bos], [0]
        for turn in turns:
            answer = turn["role"] == "assistant"
            text = turn["content"] if answer else f"[INST] {turn['content']} [/INST]"
            new = [*self._tokenizer.sentencepiece(text), *[self._tokenizer.eos] * answer]
            ids += new
            mask += [int(checks.is_learnt(turn))] * len(new)
        return ids, mask


class V3:
    """`<s>[INST] question[/INST] answer</s>...` with brackets as tokens; the last one has system and tools."""

    source: str | None = None
    name = "Mistral's own form, mistral-common's v3"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def example(self, messages: Any, tools: Any = None) -> Written:
        found = checks.checked(messages)
        checks.require_answers(found)
        system, turns = _apart(found)
        if turns[-1]["role"] != "assistant":
            raise ValueError("the last turn must be the assistant's: there is nothing to learn after a question")
        return self._encode(turns, system, checks.tools_of(tools))

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        system, turns = _apart(checks.checked(messages, blank=True))
        if turns[-1]["role"] not in ("user", "tool"):
            raise ValueError("the last message must be the user's or a tool's")
        return self._encode(turns, system, checks.tools_of(tools))[0]

    def _encode(self, turns: list[Message], system: str, tools: Tools) -> Written:
        _check_calls(turns)
        last = max(index for index, turn in enumerate(turns) if turn["role"] == "user")
        ids, mask = [self._tokenizer.bos], [0]
        for index, turn in enumerate(turns):
            if turn["role"] == "user":
                new = self._question(turn["content"], system, tools, last=index == last)
            else:
                new = self._answer(turn) if turn["role"] == "assistant" else self._result(turn)
            ids += new
            mask += [int(checks.is_learnt(turn))] * len(new)
        return ids, mask

    def _question(self, text: str, system: str, tools: Tools, *, last: bool) -> list[int]:
        offered = (
            self._between("AVAILABLE_TOOLS", _json([_offer(tool) for tool in tools])) if last and tools else []
        )
        return [*offered, *self._between("INST", f"{system}\n\n{text}" if last and system else text)]

    def _answer(self, turn: Message) -> list[int]:
        encode, eos = self._tokenizer.sentencepiece, self._tokenizer.eos
        if "tool_calls" not in turn:
            return [*encode(turn["content"].rstrip(" ")), eos]
        calls = [_asked(call) for call in turn["tool_calls"]]
        return [self._tokenizer.control["[TOOL_CALLS]"], *encode(_json(calls)), eos]

    def _result(self, turn: Message) -> list[int]:
        value = {"content": _value(turn.get("content") or "{}"), "call_id": turn["tool_call_id"]}
        return self._between("TOOL_RESULTS", _json(value))

    def _between(self, name: str, text: str) -> list[int]:
        control = self._tokenizer.control
        return [control[f"[{name}]"], *self._tokenizer.sentencepiece(text), control[f"[/{name}]"]]


def _apart(messages: list[Message]) -> tuple[str, list[Message]]:
    """The system's words, and the other turns with neighbours of one role joined, as in mistral-common."""
    turns = _joined(messages)
    if any(
        before["role"] == "assistant" and turn["role"] == "system" for before, turn in itertools.pairwise(turns)
    ):
        raise ValueError("a system message after an answer: Mixtral's form has no place for it")
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system" and turn["content"])
    turns = [turn for turn in turns if turn["role"] != "system"]
    if not turns or turns[0]["role"] != "user":
        raise ValueError("the first turn after the system's must be the user's")
    return system, turns


def _joined(messages: Iterable[Message]) -> list[Message]:
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else None
        if before is None or message["role"] == "tool" or not _goes_on(before, message):
            joined.append(message)
            continue
        both = [m["content"] for m in (before, message) if m.get("content")]
        calls = [*before.get("tool_calls", ()), *message.get("tool_calls", ())]
        joined[-1] = {**before, "content": "\n\n".join(both), **({"tool_calls": calls} if calls else {})}
    return joined


def _goes_on(before: Message, message: Message) -> bool:
    return before["role"] == message["role"] and checks.is_learnt(before) == checks.is_learnt(message)


def _check_calls(turns: list[Message]) -> None:
    """mistral-common's rules: a call or words, ids of nine letters and digits, a result for each call."""
    open_calls = 0
    for index, turn in enumerate(turns):
        calls = turn.get("tool_calls", [])
        if turn["role"] == "assistant":
            if open_calls:
                raise ValueError(f"an answer before {open_calls} of the tool calls before it had their results")
            if calls and turn.get("content"):
                raise ValueError("content beside tool_calls in one answer: Mistral's v3 form has no place for both")
            for call in calls:
                if not (CALL_ID.fullmatch(str(call.get("id"))) or (index == len(turns) - 1 and _unnamed(call))):
                    raise ValueError(
                        f"tool call id {call.get('id')!r} isn't nine letters and digits, as Mistral's are"
                    )
            open_calls = len(calls)
        elif turn["role"] == "tool":
            if not CALL_ID.fullmatch(str(turn.get("tool_call_id"))):
                raise ValueError(
                    f"tool_call_id {turn.get('tool_call_id')!r} isn't nine letters and digits, as Mistral's are"
                )
            open_calls -= 1
            if open_calls < 0:
                raise ValueError("a tool's result without a call before it")


def _unnamed(call: dict[str, Any]) -> bool:
    return call.get("id") in (None, "null")


def _asked(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    asked = {"name": function["name"], "arguments": _value(function.get("arguments") or "{}")}
    return asked if _unnamed(call) else {**asked, "id": call["id"]}


def _offer(tool: dict[str, Any]) -> dict[str, Any]:
    function = tool["function"]
    described = {"name": function["name"], "description": function.get("description") or ""}
    return {"type": "function", "function": {**described, "parameters": function.get("parameters") or {}}}


def _value(text: Any) -> Any:
    """What a text of JSON says; any other text is itself."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
