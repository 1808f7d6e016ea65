"""Conversations by a Jinja chat template: transformers' ids, with a mask of what the assistant says.

Learnt is what an assistant's turn adds to the prompt before it, up to its end token; or, in a template that has
them, what stands between `{% generation %}` and `{% endgeneration %}`. Nobody's words become control tokens: they
are encoded as transformers' `sanitize_control_tokens` does.
"""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat, jinja_world
from megatron_mixtral.tokenization import messages as checks
from megatron_mixtral.tokenization.chat import Tools, Written
from megatron_mixtral.tokenization.jinja_world import BEGIN, END
from megatron_mixtral.tokenization.messages import Message
from megatron_mixtral.tokenization.settings import DEFAULT, WITH_TOOLS
from megatron_mixtral.tokenization.tokenizer import Spans, Tokenizer, names_pattern

# Characters that no text has: around a control token's name in somebody's words.
OPEN, CLOSE = "\ufdd0", "\ufdd3"
MARKS = (OPEN, CLOSE, BEGIN, END)
OWN = "mistral"  # the name of the form that needs no template
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of one thing

# Mixtral-8x7B-Instruct's format, equal to mistral-common's token for token: `[INST] question [/INST] answer</s>`.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 is even) %}"
    "{{ raise_exception('messages must alternate: user, assistant, user, ...') }}{% endif %}"
    "{% if message.role == 'user' %}{{ '[INST] ' ~ message.content ~ ' [/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' ~ message.content ~ eos_token }}"
    "{% else %}{{ raise_exception('Mixtral knows the roles user and assistant') }}{% endif %}"
    "{% endfor %}"
)


def form(tokenizer: Tokenizer, asked: str | None = None) -> chat.Form:
    """How conversations are written: as `asked` (a file, or `mistral`), else by the tokenizer's own template.

    A tokenizer without one, or with one that writes Mixtral's `[INST]`, is served by mistral-common's form.
    """
    if asked == OWN:
        return chat.own(tokenizer)
    if asked:
        try:
            return Template({DEFAULT: Path(asked).expanduser().read_text()}, tokenizer, where=asked)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{asked}: {error}") from error
    if not tokenizer.templates:
        return chat.own(tokenizer)
    if DEFAULT not in tokenizer.templates:
        raise InputError(
            f"the tokenizer's chat templates are {', '.join(tokenizer.templates)}, none of them default: "
            "give one as a file, or mistral"
        )
    found = Template(tokenizer.templates, tokenizer, where="the tokenizer's chat template")
    return chat.own(tokenizer) if found.writes_inst() else found


class Template:
    """One template, or one for talks with tools beside it, with the control tokens of one tokenizer."""

    name = "a chat template"

    def __init__(self, sources: dict[str, str], tokenizer: Tokenizer, *, where: str) -> None:
        self.source = sources[DEFAULT]
        self._tokenizer = tokenizer
        try:
            self._templates = {name: jinja_world.compiled(source) for name, source in sources.items()}
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: {error}") from error
        written = "\0".join(map(jinja_world.literals, sources.values()))
        self._control = {
            name: tokenizer.added[name]
            for name, special in tokenizer.matched.items()
            if special or name in tokenizer.control or (name in written and not name.isspace())
        }
        self._names = names_pattern(list(self._control))
        self._marked = re.compile(f"{OPEN}({self._names.pattern}){CLOSE}|[{OPEN}{CLOSE}]")

    def example(self, messages: Any, tools: Any = None) -> Written:
        talk, offered = self._checked(messages, tools)
        checks.require_answers(talk)
        whole = self._rendered(talk, offered)
        if BEGIN in whole:
            text, spans = _enclosed(whole)
            self._check_ends(text, spans)
            spans = _learnt(spans, talk)
        else:
            text, spans = whole, list(self._added(talk, offered, whole))
        self._check_used(talk, offered, whole)
        ids, places = self._encode(text)
        return ids, _mask(places, spans)

    def prompt(self, messages: Any, tools: Any = None) -> list[int]:
        talk, offered = self._checked(messages, tools, blank=True)
        whole = self._rendered(talk, offered, prompt=True)
        self._check_used(talk, offered, whole, prompt=True)
        return self._encode(whole.replace(BEGIN, "").replace(END, ""))[0]

    def writes_inst(self) -> bool:
        """Whether this is Mixtral's own form, which mistral-common knows token for token."""
        talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
        try:
            text = self._rendered([{"role": role, "content": content} for role, content in talk], None)
        except ValueError:
            return False
        words = self._tokenizer
        for index in (words.bos, words.eos):
            text = text.replace(words.piece(index), "")
        return "".join(text.split()) == "[INST]a[/INST]b[INST]c[/INST]"

    def _checked(self, messages: Any, tools: Any, *, blank: bool = False) -> tuple[list[Message], Tools]:
        talk, offered = checks.checked(messages, blank=blank), checks.tools_of(tools)
        if any(mark in json.dumps([talk, offered], ensure_ascii=False) for mark in MARKS):
            raise ValueError("a character that Unicode keeps out of text (U+FDD0 to U+FDD3)")
        return talk, offered

    def _rendered(self, talk: list[Message], tools: Tools, *, prompt: bool = False) -> str:
        name = WITH_TOOLS if tools is not None and WITH_TOOLS in self._templates else DEFAULT
        given = {"messages": [self._shown(m) for m in talk], "tools": self._guarded(tools), "documents": None}
        try:
            return self._templates[name].render(add_generation_prompt=prompt, **given, **self._tokenizer.named)
        except Exception as error:  # whatever its expressions come to with these words
            raise ValueError(f"the chat template: {error or type(error).__name__}") from error

    def _shown(self, message: Message) -> Message:
        """What a template sees of a message, as transformers shows it."""
        shown = {key: value for key, value in message.items() if key not in checks.WEIGHTS}
        if (thought := next((shown[key] for key in REASONING if key in shown), None)) is not None:
            shown = {"thinking": thought, **shown, "reasoning_content": thought}
        return self._guarded(shown)

    def _guarded(self, value: Any) -> Any:
        """`value` with every control token's name in its words between marks, which `_encode` heeds."""
        if isinstance(value, dict):
            return {key: self._guarded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._guarded(one) for one in value]
        if not isinstance(value, str):
            return value
        return self._names.sub(lambda found: OPEN + found[0] + CLOSE, value)

    def _check_used(self, talk: list[Message], tools: Tools, whole: str, *, prompt: bool = False) -> None:
        """`ValueError` for what the template leaves out: it would be learnt, or answered, without a word of it."""
        if tools is not None and self._rendered(talk, None, prompt=prompt) == whole:
            raise ValueError("tools: the chat template doesn't write them")
        for index, message in enumerate(talk):
            content = message.get("content", "")
            others: dict[str, Any] = {"tool_calls": []} if "tool_calls" in message else {}
            if self._guarded(content).strip() not in whole:
                others["content"] = f"{content} x"
            for key, value in others.items():
                other = [*talk[:index], message | {key: value}, *talk[index + 1 :]]
                if self._rendered(other, tools, prompt=prompt) == whole:
                    raise ValueError(
                        f"messages[{index}]: the chat template doesn't write the {message['role']}'s {key}"
                    )

    def _added(self, talk: list[Message], tools: Tools, whole: str) -> Iterator[tuple[int, int]]:
        """Where each learnt answer stands: what it adds to the text before it, up to its end token."""
        for index, message in enumerate(talk):
            if message["role"] != "assistant":
                continue
            before = self._rendered(talk[:index], tools, prompt=True) if index else ""
            after = self._rendered(talk[: index + 1], tools)
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages[{index}]: the chat template writes it otherwise when more follows; mark what is "
                    "learnt in the template by {% generation %}"
                )
            named = [
                found for found in self._names.finditer(after, len(before)) if after[found.start() - 1] != OPEN
            ]
            if not named or self._control[named[-1][0]] not in self._tokenizer.ends:
                raise ValueError(f"messages[{index}]: the chat template doesn't end it with {self._ends()}")
            if checks.is_learnt(message):
                yield len(before), named[-1].end()

    def _check_ends(self, text: str, spans: list[tuple[int, int]]) -> None:
        ends = tuple(self._tokenizer.piece(index) for index in self._tokenizer.ends)
        for begin, end in spans:
            if not text[begin:end].rstrip().endswith(ends):
                raise ValueError(
                    f"what the chat template marks by {{% generation %}} doesn't end with {self._ends()}"
                )

    def _ends(self) -> str:
        words = self._tokenizer
        return f"{' or '.join(words.piece(index) for index in words.ends)}, where servers stop"

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        """Ids and places of what was rendered; what stands between marks is characters."""
        ids: list[int] = []
        places: Spans = []
        for at, piece, spelt in self._pieces(text):
            new, spans = self._tokenizer.rendered(piece) if at == 0 else self._inside(piece, spelt=spelt)
            ids += new
            places += [(begin + at, end + at) for begin, end in spans]
        return ids, places

    def _pieces(self, text: str) -> Iterator[tuple[int, str, bool]]:
        """(begin, piece, whether it is a control token's name in somebody's words); the first one may be empty."""
        at = 0
        for found in self._marked.finditer(text):
            if at == 0 or found.start() > at:
                yield at, text[at : found.start()], False
            if found[1] is not None:
                yield found.start(1), found[1], True
            at = found.end()
        if at == 0 or at < len(text):
            yield at, text[at:], False

    def _inside(self, piece: str, *, spelt: bool) -> tuple[list[int], Spans]:
        """Ids of a piece in the midst of a text: behind a line's end, so that no space is put before it."""
        encode, line = (
            self._tokenizer.spelt if spelt else self._tokenizer.rendered,
            self._tokenizer.rendered("\n")[0],
        )
        ids, spans = encode(f"\n{piece}")
        if ids[: len(line)] != line:
            return encode(piece)
        return ids[len(line) :], [(max(begin - 1, 0), end - 1) for begin, end in spans[len(line) :]]


def _enclosed(text: str) -> tuple[str, list[tuple[int, int]]]:
    """`text` without the marks of `{% generation %}`, and what stood between them."""
    parts = re.split(f"([{BEGIN}{END}])", text)
    ends = list(itertools.accumulate(len(part) for part in parts[::2]))
    begins = [end for end, mark in zip(ends, parts[1::2], strict=False) if mark == BEGIN]
    closes = [end for end, mark in zip(ends, parts[1::2], strict=False) if mark == END]
    return "".join(parts[::2]), list(zip(begins, closes, strict=False))


def _learnt(spans: list[tuple[int, int]], talk: list[Message]) -> list[tuple[int, int]]:
    """Those of answers that are to be learnt."""
    answers = [message for message in talk if message["role"] == "assistant"]
    if all(map(checks.is_learnt, answers)):
        return spans
    if len(answers) != len(spans):
        raise ValueError("weight: the chat template marks by {% generation %} other stretches than the answers")
    return [span for span, message in zip(spans, answers, strict=True) if checks.is_learnt(message)]


def _mask(places: Spans, spans: list[tuple[int, int]]) -> list[int]:
    """1 for each token that has a character of a span."""
    mask, left = [], iter(spans)
    span = next(left, None)
    for begin, end in places:
        while span is not None and begin >= span[1]:
            span = next(left, None)
        mask.append(int(span is not None and end > span[0]))
    return mask
