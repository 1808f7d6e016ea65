"""What mistral-common makes of a conversation: the reference for ids, and for which of them are an answer's.

An answer's tokens are those that come with it: what is up to the question is encoded, then that with the answer.
"""

import functools
from pathlib import Path
from typing import Any

import mistral_common
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, ToolMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.tool_calls import Tool
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from megatron_mixtral.jobs import tiny

KINDS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage, "tool": ToolMessage}
V3 = Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@functools.cache
def _reference(mode: ValidationMode, file: Path) -> MistralTokenizer:
    return MistralTokenizer.from_file(file, mode=mode)


def ids(talk: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, as a request when it ends with a question, as an example when with an answer."""
    return _ids(talk, tiny.mixtral_sentencepiece())


def v3_ids(talk: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
    """The same by Mixtral 8x22B's rules."""
    return _ids(talk, V3, tools=[Tool.from_openai(tool) for tool in tools or []] or None)


def _ids(talk: list[dict[str, Any]], file: Path, **more: Any) -> list[int]:
    mode = ValidationMode.finetuning if talk[-1]["role"] == "assistant" else ValidationMode.test
    messages = [KINDS[turn["role"]](**{k: v for k, v in turn.items() if k != "role"}) for turn in talk]
    request = ChatCompletionRequest(messages=messages, **more)
    return _reference(mode, file).encode_chat_completion(request).tokens


def ids_and_mask(talk: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids, and a 1 for each that belongs to an answer or ends one; answers that are neighbours are one."""
    whole = ids(talk)
    mask = [0] * len(whole)
    roles = [turn["role"] for turn in talk]
    for first in (n for n, role in enumerate(roles) if role == "assistant" and roles[n - 1] != "assistant"):
        end = next((n for n in range(first, len(roles)) if roles[n] != "assistant"), len(roles))
        before, after = ids(talk[:first]), ids(talk[:end])
        assert after[: len(before)] == before
        assert whole[: len(after)] == after
        mask[len(before) : len(after)] = [1] * (len(after) - len(before))
    return whole, mask
