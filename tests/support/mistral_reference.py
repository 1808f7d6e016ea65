"""What mistral-common makes of a conversation: the reference for ids, and for which of them are an answer's.

An answer's tokens are those that come with it: what is up to the question is encoded, then that with the answer.
"""

import functools

from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.protocol.instruct.validator import ValidationMode
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from megatron_mixtral.jobs import tiny

KINDS = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@functools.cache
def _reference(mode: ValidationMode) -> MistralTokenizer:
    return MistralTokenizer.from_file(tiny.mixtral_sentencepiece(), mode=mode)


def ids(talk: list[dict[str, str]]) -> list[int]:
    """Ids of a conversation, as a request when it ends with a question, as an example when with an answer."""
    mode = ValidationMode.finetuning if talk[-1]["role"] == "assistant" else ValidationMode.test
    request = ChatCompletionRequest(messages=[KINDS[turn["role"]](content=turn["content"]) for turn in talk])
    return _reference(mode).encode_chat_completion(request).tokens


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
