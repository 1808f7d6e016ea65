"""A conversation's messages, checked before any form writes them: who speaks, in what words, with which tools.

What is right is returned in one shape; what no form may guess at is a `ValueError` that names the message.
"""

import json
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
WEIGHTS = ("weight", "train", "trainable")  # what tells whether an answer is learnt
# What would change the text, and that no form here writes.
UNSUPPORTED = ("function_call", "audio", "images", "image", "videos", "prefix")
Message = dict[str, Any]


def checked(messages: Any, *, roles: tuple[str, ...] = ROLES, blank: bool = False) -> list[Message]:
    """Copies with `content` as text, where there is any; answers without words are refused unless `blank`."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages isn't a non-empty list")
    return [_message(message, f"messages[{index}]", roles, blank) for index, message in enumerate(messages)]


def is_learnt(message: Message) -> bool:
    """Whether this message's words are learnt: an assistant's, unless it is marked otherwise."""
    return message["role"] == "assistant" and all(message[name] for name in WEIGHTS if name in message)


def require_answers(messages: list[Message]) -> None:
    """`ValueError` where nothing would be learnt."""
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no message is the assistant's: there is nothing to learn")
    if not any(map(is_learnt, answers)):
        raise ValueError("no answer is to be learnt: each has weight 0")


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """A row's `tools`: a list of functions, or one written as text; None for none."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise ValueError(f"tools: not JSON: {error}") from error
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise ValueError(f"tools is {kind(value)}, not a list of functions")
    return [_tool(tool, f"tools[{index}]") for index, tool in enumerate(value)]


def kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _tool(tool: Any, where: str) -> dict[str, Any]:
    if isinstance(tool, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        tool = {"type": "function", "function": tool}
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} isn't an object with a `function` that has a `name`")
    if not isinstance(function.get("parameters") or {}, dict):
        raise ValueError(f"{where}.function.parameters is {kind(function['parameters'])}, not an object")
    return tool


def _message(message: Any, where: str, roles: tuple[str, ...], blank: bool) -> Message:
    if not isinstance(message, dict):
        raise ValueError(f"{where} isn't an object with a text `content`")
    role = message.get("role")
    if role not in roles:
        raise ValueError(f"{where}: role {role!r} isn't one of {', '.join(roles)}")
    if named := next((name for name in UNSUPPORTED if message.get(name)), None):
        raise ValueError(f"{where}: `{named}` isn't supported: text and tool_calls are")
    found = {name: value for name, value in message.items() if value is not None}
    calls = _calls(found, where)
    found.pop("tool_calls", None)
    if calls:
        found["tool_calls"] = calls
    if "content" not in found and not calls:
        raise ValueError(f"{where} isn't an object with a text `content`: it has {_has(message)}")
    if "content" in found:
        found["content"] = _text(found["content"], where)
    _check_weights(found, where)
    if role == "user" and not blank and not found["content"].strip():
        raise ValueError(f"{where}: the user's content is empty")
    if role == "assistant" and not (blank or calls or found["content"].strip()):
        raise ValueError(f"{where}: the assistant's content is empty")
    return found


def _has(message: dict[str, Any]) -> str:
    return "null" if "content" in message else "none"


def _text(content: Any, where: str) -> str:
    """Text as it is, or its parts, which mistral-common sets apart by a line."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where} isn't an object with a text `content`: it is {kind(content)}")
    texts = []
    for index, part in enumerate(content):
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            texts.append(part["text"])
        else:
            what = part.get("type") if isinstance(part, dict) else kind(part)
            raise ValueError(
                f"{where} isn't an object with a text `content`: part {index} is {what!r}, "
                "and Mixtral reads text alone"
            )
    return "\n\n".join(text for text in texts if text)


def _calls(message: Message, where: str) -> list[dict[str, Any]]:
    calls = message.get("tool_calls")
    if not calls:
        return []
    if message["role"] != "assistant" or not isinstance(calls, list):
        raise ValueError(f"{where}: tool_calls isn't a list of an assistant's calls")
    return [_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    if isinstance(call, dict) and "function" not in call and isinstance(call.get("name"), str):
        call = {"type": "function", "function": call}
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} isn't an object with a `function` that has a `name`")
    if not isinstance(function.get("arguments", {}), str | dict):
        raise ValueError(f"{where}.function.arguments is {kind(function['arguments'])}, not text or an object")
    return call


def _check_weights(message: Message, where: str) -> None:
    for name in WEIGHTS:
        if name in message and message[name] not in (0, 1, True, False):
            raise ValueError(f"{where}: {name} {message[name]!r} isn't 0 or 1")
