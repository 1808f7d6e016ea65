"""`mixlaunch tokens`: conversations as a model's tokens, with ids, control tokens and what is learnt of them.

Where transformers gives other ids by the folder's own chat template, they are shown beside ours.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mixtral.data import documents, formats
from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.tokenization import chat_template, show, tokenizer
from megatron_mixtral.tokenization import messages as checks
from megatron_mixtral.tokenization.chat import Form
from megatron_mixtral.tokenization.tokenizer import Tokenizer
from megatron_mixtral.weights import folder as weights_folder

SAMPLE = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "And Spain's?"},
    {"role": "assistant", "content": "Madrid."},
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("file", nargs="?")
    parser.add_argument("--chat-template")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--colour", action="store_true")
    asked = parser.parse_args(argv)
    try:
        for line in shown(asked.model, asked.file, asked.chat_template, asked.count, colour=asked.colour):
            print(line, flush=True)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def shown(model: Path, file: str | None, template: str | None, count: int, *, colour: bool) -> Iterator[str]:
    """What is printed, line by line; `InputError` for a folder or a row that can't be read."""
    folder = model.expanduser()
    words = tokenizer.find(folder) or tokenizer.load(weights_folder.find(folder))
    form = chat_template.form(words, template)
    ends = ", ".join(f"{words.piece(index)} ({index})" for index in words.ends)
    yield f"{model}: {words.vocab_size:,} tokens; conversations by {form.name}; answers end with {ends}"
    yield from (f"note: {note}" for note in words.notes)
    for where, row in _rows(file, count):
        yield ""
        try:
            yield from _row(where, row, words, form, colour)
            if row.messages is not None:
                yield from _compared(folder, row, words, form, template)
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error


def _rows(file: str | None, count: int) -> Iterator[tuple[str, formats.Row]]:
    if file is None:
        yield "a sample", formats.Row(format="messages", messages=SAMPLE)
        return
    left = count
    for path in documents.find([file]):
        for piece in documents.pieces([path]):
            for number, value in documents.values(piece):
                if left == 0:
                    return
                left -= 1
                try:
                    yield f"{path}:{number}", formats.read(value(), formats.Fields())
                except (ValueError, RecursionError) as error:
                    raise InputError(f"{path}:{number}: {error}") from error


def _row(where: str, row: formats.Row, words: Tokenizer, form: Form, colour: bool) -> Iterator[str]:
    if row.messages is not None:
        ids, mask = form.example(row.messages, row.tools)
    else:
        ids = row.ids or [words.bos, *words.encode(row.text or ""), words.eos]
        mask = row.learnt or [1] * len(ids)
    yield f"{where}: {row.format}, {len(ids)} tokens, {sum(mask)} learnt"
    yield show.pieces(words, ids, mask, colour=colour)
    yield show.numbers(words, ids, mask, colour=colour)


def _compared(folder: Path, row: formats.Row, words: Tokenizer, form: Form, template: str | None) -> Iterator[str]:
    """What transformers makes of it, where that is something else."""
    if words.chat_template is None or not folder.is_dir():
        return
    try:
        theirs = _by_transformers(folder, row, form.source if template not in (None, chat_template.OWN) else None)
    except ImportError:
        yield "transformers isn't installed here: its ids aren't shown"
        return
    except Exception as error:  # whatever a folder or a template comes to there
        yield f"transformers: refuses it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        return
    ours = form.example(row.messages, row.tools)[0]
    if theirs == ours:
        yield "transformers: the same ids"
        return
    first = next(
        (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs))
    )
    yield f"transformers, by the folder's chat template: other ids from token {first} on, {len(theirs)} in all"
    yield show.pieces(words, theirs, [0] * len(theirs))
    yield show.numbers(words, theirs, [0] * len(theirs))


def _by_transformers(folder: Path, row: formats.Row, template: str | None) -> list[int]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    talk = [{k: v for k, v in m.items() if k not in checks.WEIGHTS} for m in checks.checked(row.messages)]
    options: dict[str, Any] = {"tools": checks.tools_of(row.tools), "return_dict": False}
    known = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found: Any = known.apply_chat_template(talk, chat_template=template, **options)
    return list(found)


if __name__ == "__main__":
    sys.exit(main())
