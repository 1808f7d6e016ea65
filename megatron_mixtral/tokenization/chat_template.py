"""Conversations by a Jinja chat template, as transformers renders it, with a mask of what the assistant says.

Learnt is what an assistant's turn adds to the prompt before it, up to its end token; or, in a template that has
them, what stands between `{% generation %}` and `{% endgeneration %}`. Nobody's words become control tokens.
"""

import itertools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat
from megatron_mixtral.tokenization.chat import Turn
from megatron_mixtral.tokenization.tokenizer import Tokenizer

# Characters that no text has: the first breaks a control token's name in somebody's words, two enclose answers.
GUARD, BEGIN, END = "\ufdd0", "\ufdd1", "\ufdd2"
OWN = "mistral"  # the name of the form that needs no template
ROLES = (*chat.ROLES, "tool")

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


def form(tokenizer: Tokenizer, asked: str | None = None) -> "Template | chat.Instruct":
    """How conversations are written: as `asked` (a file, or `mistral`), else by the tokenizer's own template.

    A tokenizer without one, or with one that writes Mixtral's `[INST]`, is served by mistral-common's form.
    """
    if asked == OWN:
        return chat.Instruct()
    if asked:
        try:
            return Template(Path(asked).expanduser().read_text(), tokenizer, where=asked)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{asked}: {error}") from error
    if not tokenizer.chat_template:
        return chat.Instruct()
    found = Template(tokenizer.chat_template, tokenizer, where="the tokenizer's chat template")
    return chat.Instruct() if found.writes_inst() else found


class Template:
    """One template, with the control tokens of one tokenizer."""

    def __init__(self, source: str, tokenizer: Tokenizer, *, where: str) -> None:
        self.source = source
        self._tokenizer, self._control = tokenizer, tokenizer.control
        names = sorted(map(re.escape, self._control), key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(names)})")
        world = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        world.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
        world.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = world.from_string(source)
        except jinja2.TemplateError as error:
            raise InputError(f"{where}: {error}") from error

    def from_messages(self, messages: Any) -> list[Turn]:
        """Stretches of its text, the learnt ones as the assistant's; `ValueError` says what is wrong."""
        _check(messages)
        whole = self._rendered(messages)
        if BEGIN in whole:
            return _enclosed(whole)
        return list(self._added(messages, whole))

    def question(self, messages: list[dict[str, Any]]) -> list[Turn]:
        """The text up to where the assistant speaks."""
        _check(messages)
        return [("user", self._rendered(messages, prompt=True).replace(BEGIN, "").replace(END, ""))]

    def encode(self, tokenizer: Tokenizer, turns: list[Turn]) -> tuple[list[int], list[int]]:
        """Ids and mask; text between two control tokens is encoded as a whole, as transformers does."""
        whole = "".join(text for _, text in turns)
        ends = list(itertools.accumulate(len(text) for _, text in turns))
        ids: list[int] = []
        cuts: list[int] = []  # how many ids belong to the stretches up to each one's end
        at = 0
        for part in self._names.split(whole):
            inside = [end - at for end in ends[len(cuts) :] if end - at <= len(part)]
            if part in self._control:
                cuts += [len(ids) + (cut > 0) for cut in inside]
                ids.append(self._control[part])
            else:
                new = self._text_ids(tokenizer, part)
                cuts += [len(ids) + self._count(tokenizer, new, part, cut) for cut in inside]
                ids += new
            at += len(part)
        mask = [0] * len(ids)
        for (role, _), begin, end in zip(turns, [0, *cuts], cuts, strict=False):
            mask[begin:end] = [int(role == "assistant")] * (end - begin)
        return ids, mask

    def writes_inst(self) -> bool:
        """Whether this is Mixtral's own form, which mistral-common knows token for token."""
        talk = [("user", "a"), ("assistant", "b"), ("user", "c")]
        try:
            text = self._rendered([{"role": role, "content": content} for role, content in talk])
        except ValueError:
            return False
        return "".join(self._names.sub("", text).split()) == "[INST]a[/INST]b[INST]c[/INST]"

    def _rendered(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        t = self._tokenizer
        tokens = {"bos_token": t.piece(t.bos), "eos_token": t.piece(t.eos)}
        try:
            return self._template.render(messages=self._guarded(messages), add_generation_prompt=prompt, **tokens)
        except Exception as error:  # whatever its expressions come to with these words
            raise ValueError(f"the chat template: {error or type(error).__name__}") from error

    def _guarded(self, value: Any) -> Any:
        """`value` with every control token's name in its words broken by a character that `encode` takes out."""
        if isinstance(value, dict):
            return {key: self._guarded(one) for key, one in value.items()}
        if isinstance(value, list):
            return [self._guarded(one) for one in value]
        if not isinstance(value, str):
            return value
        return self._names.sub(lambda found: found[0][0] + GUARD + found[0][1:], value)

    def _added(self, messages: list[dict[str, Any]], whole: str) -> Iterator[Turn]:
        """What each of the assistant's turns adds to the text before it, and what lies between."""
        done = 0
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self._rendered(messages[:index], prompt=True), self._rendered(messages[: index + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise ValueError(
                    f"messages[{index}]: the chat template writes it otherwise when more follows; mark what is "
                    "learnt in the template by {% generation %}"
                )
            named = list(self._names.finditer(after, len(before)))
            if not named or self._control[named[-1][0]] != self._tokenizer.eos:
                eos = self._tokenizer.piece(self._tokenizer.eos)
                raise ValueError(
                    f"messages[{index}]: the chat template doesn't end it with {eos}, where servers stop"
                )
            yield "user", whole[done : len(before)]
            done = named[-1].end()
            yield "assistant", whole[len(before) : done]
        yield "user", whole[done:]

    def _count(self, tokenizer: Tokenizer, ids: list[int], text: str, cut: int) -> int:
        """How many of `ids`, which are `text`'s, are whole before `cut`."""
        if cut == len(text):
            return len(ids)
        before = self._text_ids(tokenizer, text[:cut])
        return next((n for n, (a, b) in enumerate(zip(ids, before, strict=False)) if a != b), len(before))

    def _text_ids(self, tokenizer: Tokenizer, text: str) -> list[int]:
        return tokenizer.encode(text.replace(GUARD, "")) if text else []


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what stands in it is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END)]
        return [marks[0], *body, marks[1]]


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _check(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages isn't a non-empty list")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"messages[{index}] isn't an object with a `role` of {', '.join(ROLES)}")
    if any(mark in json.dumps(messages, ensure_ascii=False) for mark in (GUARD, BEGIN, END)):
        raise ValueError("a character that Unicode keeps out of text (U+FDD0 to U+FDD2)")


def _enclosed(text: str) -> list[Turn]:
    """The stretches of `text` in and out of the marks."""
    stretches = []
    for part in re.split(f"({BEGIN}[^{END}]*{END})", text):
        inside = part.startswith(BEGIN)
        stretches.append(("assistant" if inside else "user", part.strip(BEGIN + END) if inside else part))
    return stretches
