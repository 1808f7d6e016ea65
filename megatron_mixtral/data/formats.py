"""A row of a data set as text, ids or a conversation, in whichever of the common formats it was written.

A field that would change what is learnt, and that the row's format doesn't use, is an error: nothing is left out
silently.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.tokenization.messages import kind

Messages = list[dict[str, Any]]
# Fields that change what is learnt, in one format or another.
MEANINGFUL = frozenset(
    (
        *("tools", "functions", "system", "system_prompt", "history", "input", "context", "suffix", "labels"),
        *("images", "image", "videos", "audio", "audios", "weight", "train", "trainable", "chosen", "rejected"),
    )
)
# Who speaks, in ShareGPT's words.
SPEAKERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function_response", "ipython"), "tool"),
    "function_call": "function_call",
}


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The keys of a JSON object's text; `format` is the format of all rows, or None to recognise each one's."""

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"
    format: str | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One of text, ids with what is learnt of them, and a conversation."""

    format: str
    text: str | None = None
    ids: list[int] | None = None
    learnt: list[int] | None = None
    messages: Any = None
    tools: Any = None


def read(value: Any, fields: Fields) -> Row:
    """`value` in its format; `ValueError` for an unknown one, and for a meaningful field that isn't used."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object on each line, got {type(value).__name__}")
    row = {name: one for name, one in value.items() if one is not None and name not in fields.ignored}
    name = fields.format or _recognised(row, fields)
    found, used = _READERS[name](row, fields)
    _check_used(row, name, used)
    return found


def _recognised(row: dict[str, Any], fields: Fields) -> str:
    """The first format that has its fields."""
    if fields.messages in row:
        return "sharegpt" if _from_value(row[fields.messages]) else "messages"
    if fields.prompt in row and fields.completion in row:
        return "prompt"
    if isinstance(row.get(fields.text), str):
        return "text"
    if "conversations" in row:
        return "sharegpt" if _from_value(row["conversations"]) else "messages"
    for name, needed in _NEEDED.items():
        if all(key in row for key in needed):
            return name
    if fields.text in row:
        raise ValueError(f"{fields.text!r} is {kind(row[fields.text])}, not text")
    raise ValueError(
        f"has none of: {fields.text!r} (text), {fields.messages!r}, {fields.prompt!r} with {fields.completion!r}; "
        f"nor the fields of {', '.join(_NEEDED)}; it has {', '.join(map(repr, list(row)[:8])) or 'nothing'}"
    )


def _from_value(turns: Any) -> bool:
    return isinstance(turns, list) and bool(turns) and isinstance(turns[0], dict) and "from" in turns[0]


def _check_used(row: dict[str, Any], name: str, used: set[str]) -> None:
    for key in sorted(MEANINGFUL & row.keys() - used):
        if row[key] not in ("", [], {}):
            raise ValueError(
                f"{key!r} isn't used by the format {name}, and would change what is learnt; "
                f"--ignore-fields {key} leaves it out"
            )


def _need(row: dict[str, Any], name: str, *keys: str) -> None:
    if missing := next((key for key in keys if key not in row), None):
        raise ValueError(f"has no {missing!r}, which the format {name} needs")


def _plain(row: dict[str, Any], fields: Fields) -> tuple[Row, set[str]]:
    _need(row, "text", fields.text)
    text = row[fields.text]
    if not isinstance(text, str):
        raise ValueError(f"{fields.text!r} is {type(text).__name__}, not text")
    if not text.strip():
        raise ValueError(f"{fields.text!r} is empty")
    return Row(format="text", text=text), {fields.text}


def _messages(row: dict[str, Any], fields: Fields) -> tuple[Row, set[str]]:
    key = fields.messages if fields.messages in row or "conversations" not in row else "conversations"
    _need(row, "messages", key)
    talk = row[key]
    if isinstance(talk, list):
        talk = [m | {"role": "system"} if isinstance(m, dict) and m.get("role") == "developer" else m for m in talk]
    return Row(format="messages", messages=talk, tools=_tools(row)), {key, "tools", "functions"}


def _tools(row: dict[str, Any]) -> Any:
    return row.get("tools", row.get("functions"))


def _sharegpt(row: dict[str, Any], fields: Fields) -> tuple[Row, set[str]]:
    key = fields.messages if fields.messages in row else "conversations"
    _need(row, "sharegpt", key)
    if not isinstance(row[key], list):
        raise ValueError(f"{key!r} is {kind(row[key])}, not a list of turns")
    talk = [_turn(turn, f"{key}[{index}]") for index, turn in enumerate(row[key])]
    return Row(format="sharegpt", messages=_system(row) + talk, tools=_tools(row)), {key, "system", "tools"}


def _turn(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise ValueError(f"{where} isn't an object with `from` and `value`")
    role = SPEAKERS.get(turn["from"])
    if role is None:
        raise ValueError(f"{where}: from {turn['from']!r} isn't one of {', '.join(SPEAKERS)}")
    more = {name: one for name, one in turn.items() if name not in ("from", "value")}
    if role != "function_call":
        return {**more, "role": role, "content": turn["value"]}
    try:
        call = json.loads(turn["value"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: a function_call whose value isn't JSON: {error}") from error
    return {**more, "role": "assistant", "tool_calls": call if isinstance(call, list) else [call]}


def _system(row: dict[str, Any], key: str = "system") -> Messages:
    return [{"role": "system", "content": row[key]}] if row.get(key) else []


def _alpaca(row: dict[str, Any], _: Fields) -> tuple[Row, set[str]]:
    _need(row, "alpaca", "instruction", "output")
    asked, given = row["instruction"], row.get("input")
    for key in ("instruction", "input"):
        if not isinstance(row.get(key, ""), str):
            raise ValueError(f"{key!r} is {kind(row[key])}, not text")
    talk = _system(row)
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError("'history' isn't a list of pairs: a question and its answer")
        talk += _asked(*pair)
    talk += _asked(f"{asked}\n{given}" if given else asked, row["output"])
    return Row(format="alpaca", messages=talk), {"instruction", "input", "output", "system", "history"}


def _asked(question: Any, answer: Any) -> Messages:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _prompt(row: dict[str, Any], fields: Fields) -> tuple[Row, set[str]]:
    """Strings, or lists of messages, of which those of the prompt aren't learnt."""
    _need(row, "prompt", fields.prompt, fields.completion)
    prompt, completion = row[fields.prompt], row[fields.completion]
    used = {fields.prompt, fields.completion, "tools"}
    if not isinstance(prompt, list) or not all(isinstance(m, dict) and "role" in m for m in prompt):
        return Row(format="prompt", messages=_asked(prompt, completion), tools=_tools(row)), used
    if not isinstance(completion, list):
        completion = [{"role": "assistant", "content": completion}]
    shown = [m | {"weight": 0} if m["role"] == "assistant" else m for m in prompt]
    return Row(format="prompt", messages=[*shown, *completion], tools=_tools(row)), used


def _openorca(row: dict[str, Any], _: Fields) -> tuple[Row, set[str]]:
    _need(row, "openorca", "question", "response")
    talk = _system(row, "system_prompt") + _asked(row["question"], row["response"])
    return Row(format="openorca", messages=talk), {"system_prompt", "question", "response"}


def _ids(row: dict[str, Any], _: Fields) -> tuple[Row, set[str]]:
    """`input_ids`, and `labels` that are -100 where nothing is learnt."""
    _need(row, "ids", "input_ids")
    ids, labels = row["input_ids"], row.get("labels")
    for key, numbers in (("input_ids", ids), ("labels", labels or [])):
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            raise ValueError(f"{key!r} isn't a list of whole numbers")
    if not ids or min(ids) < 0:
        raise ValueError(
            "'input_ids' is empty" if not ids else f"'input_ids' has {min(ids)}, which is no token's id"
        )
    if labels is None:
        return Row(format="ids", ids=ids), {"input_ids"}
    if len(labels) != len(ids) or any(label not in (-100, index) for index, label in zip(ids, labels, strict=True)):
        raise ValueError("'labels' aren't the input_ids, with -100 for what isn't learnt")
    return Row(format="ids", ids=ids, learnt=[int(n != -100) for n in labels]), {"input_ids", "labels"}


_READERS: dict[str, Callable[[dict[str, Any], Fields], tuple[Row, set[str]]]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "prompt": _prompt,
    "openorca": _openorca,
    "text": _plain,
    "ids": _ids,
}
FORMATS = tuple(_READERS)
# The fields by which a format is recognised whose keys no option names.
_NEEDED = {
    "alpaca": ("instruction", "output"),
    "openorca": ("question", "response"),
    "ids": ("input_ids",),
}
