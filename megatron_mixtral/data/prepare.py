"""Text and conversations -> `PREFIX.bin/.idx`, plus `PREFIX_mask.bin/.idx` when there are any.

It is parallel over byte ranges of the inputs, in bounded memory. After a kill it continues with the remaining
ranges. The output is the same for any number of workers. `PREFIX.json` is written last and marks it complete.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_mixtral.data import dataset, documents, formats, indexed
from megatron_mixtral.data.documents import Bad, Document, Piece
from megatron_mixtral.data.formats import Fields
from megatron_mixtral.errors import InputError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.observability.progress import CopyProgress
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import PrepareConfig
from megatron_mixtral.tokenization import chat, chat_template, show, tokenizer

FORMAT = 1
NAMED_BAD = 10  # bad lines named in an error
WRITTEN_OUT = ("[INST]", "</s>", "<|im_start|>")  # looked for in text, beside the tokenizer's own
SOUGHT = 8  # names at most
SHOWN = 256  # tokens that are shown from either end of a document


@dataclass(frozen=True, kw_only=True)
class Part:
    """The result of one piece; its bytes are beside it in the work folder."""

    documents: int
    tokens: int
    learnt: int  # tokens whose loss counts
    masked: int  # documents that are conversations
    bad: int  # lines that aren't a document
    named: list[Bad]  # the first of them
    formats: dict[str, int] = field(default_factory=dict)  # how many rows of each
    spelt: int = 0  # documents of text with control tokens written out


def prepare(config: PrepareConfig, run_dir: Path) -> None:
    """Prepare; `InputError` for mistakes in the input; errors of the machine are passed on."""
    words = tokenizer.load(Path(config.tokenizer).expanduser())
    files = documents.find(config.inputs)
    prefix = Path(config.output).expanduser()
    fields = Fields(
        text=config.text_key,
        messages=config.messages_key,
        prompt=config.prompt_key,
        completion=config.completion_key,
        format=config.format,
        ignored=tuple(name.strip() for name in config.ignore_fields.split(",") if name.strip()),
    )
    if fields.format not in (None, *formats.FORMATS):
        raise InputError(f"format: {fields.format!r} isn't one of {', '.join(formats.FORMATS)}")
    form = chat_template.form(words, config.chat_template)
    ids = tokenizer.ids_digest(words, rendered=form.source is not None)
    key = _key(files, fields, ids, form.source)
    events = EventLog(run_dir / rundir.EVENTS)
    for note in words.notes:
        _say(events, f"note: {note}")
    if others := documents.left_out(config.inputs):
        _say(events, f"note: left out of the folder: {', '.join(others)}")
    done, there = _done(prefix, key, config.max_bad), " (there already)"
    if not done:
        work, there = _work_folder(prefix, key), ""
        cut = documents.pieces(files)
        parts = _convert(config, cut, fields, work, events)
        _tell_formats(parts, events)
        done = _assemble(prefix, work, parts, {"key": key, "chat_template": form.source, "ids": ids}, words, files)
        shutil.rmtree(work)
    _say(
        events,
        f"{prefix}{there}: {done['documents']:,} documents, {done['masked']:,} of them conversations; "
        f"{done['tokens']:,} tokens, {done['learnt'] / done['tokens']:.0%} of them learnt",
    )
    for sample in _samples(prefix, words, config.show):
        _say(events, sample)


def _tell_formats(parts: list[Part], events: EventLog) -> None:
    counts = sum((Counter(part.formats) for part in parts), Counter[str]())
    _say(events, f"rows by format: {', '.join(f'{name} {count:,}' for name, count in counts.most_common())}")
    if spelt := sum(part.spelt for part in parts):
        _say(
            events,
            f"note: {spelt:,} documents have control tokens written out, such as </s> or [INST]: they are text, "
            "and no token is made of them; conversations are read from messages",
        )


def _say(events: EventLog, text: str) -> None:
    """Print to the log, and write an event."""
    print(text, flush=True)
    events.write("note", text=text)


def meta(prefix: Path) -> dict[str, Any] | None:
    """The description that `prepare` writes last; None for missing data, or data of another program.

    `InputError` for one that can't be read.
    """
    file = Path(f"{prefix}.json")
    if not file.is_file():
        return None
    try:
        description = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: damaged: {error}; remove it and prepare the data again") from error
    if not isinstance(description, dict):
        raise InputError(f"{file}: damaged: not an object; remove it and prepare the data again")
    return description


def _done(prefix: Path, key: str, max_bad: int) -> dict[str, Any] | None:
    """The description of an earlier run with the same inputs, if its output is complete."""
    described = meta(prefix)
    if not described or described.get("key") != key or described.get("bad", 0) > max_bad:
        return None
    try:
        stored = dataset.Documents(prefix)
    except InputError:
        return None
    return described if (stored.masks is not None) == bool(described["masked"]) else None


def _key(files: list[Path], fields: Fields, words: str, template: str | None) -> str:
    """A key that changes whenever the output would: inputs by path, size and time; fields; vocabulary; template;
    format.
    """
    stats = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    text = json.dumps([FORMAT, stats, asdict(fields), words, template])
    return hashlib.sha256(text.encode()).hexdigest()


def _work_folder(prefix: Path, key: str) -> Path:
    """The folder of finished pieces beside the output; it is emptied if it belongs to other inputs."""
    work = Path(f"{prefix}.parts")
    marker = work / "key"
    if work.exists() and (not marker.is_file() or marker.read_text() != key):
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    marker.write_text(key)
    return work


def _convert(config: PrepareConfig, cut: list[Piece], fields: Fields, work: Path, events: EventLog) -> list[Part]:
    """Every piece's part, in order, made now or before; stops when there are too many bad lines."""
    workers = min(config.workers or len(os.sched_getaffinity(0)), len(cut))
    task = partial(
        convert_piece,
        fields=fields,
        work=work,
        tokenizer_path=config.tokenizer,
        template=config.chat_template,
    )
    parts: list[Part] = []
    bad, named = 0, list[tuple[Piece, Bad]]()
    progress = CopyProgress(sum(p.end - p.start for p in cut), label="prepare", events=events)
    with _mapper(workers) as run_all:
        for piece, part in zip(cut, run_all(task, enumerate(cut)), strict=True):
            parts.append(part)
            bad += part.bad
            named += [(piece, b) for b in part.named[: NAMED_BAD - len(named)]]
            progress.add(piece.end - piece.start)
            if bad > config.max_bad:
                raise InputError(_explain(bad, named, config.max_bad))
    progress.finish()
    if bad:
        _say(events, f"warning: {_explain(bad, named, config.max_bad)}")
    return parts


class _mapper:
    """`map` over one process or many; an early exit cancels pieces that haven't begun."""

    def __init__(self, workers: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers > 1 else None

    def __enter__(self) -> Callable[..., Iterator[Part]]:
        return self._pool.map if self._pool else map

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def convert_piece(
    numbered: tuple[int, Piece], *, fields: Fields, tokenizer_path: str, template: str | None, work: Path
) -> Part:
    """Encode one piece into `work/NUMBER.{bin,mask,len}`; `NUMBER.json`, written last by rename, marks it done."""
    number, piece = numbered
    base = work / f"{number:08d}"
    done = base.with_suffix(".json")
    if done.is_file():
        raw = json.loads(done.read_text())
        return Part(**{**raw, "named": [Bad(**b) for b in raw["named"]]})
    words, form = _loaded(tokenizer_path, template)
    with (
        base.with_suffix(".bin").open("wb") as tokens,
        base.with_suffix(".mask").open("wb") as masks,
        base.with_suffix(".len").open("wb") as lengths,
    ):
        part = _encode(documents.read(piece, fields, form), words, tokens, masks, lengths)
    half = done.with_suffix(".half")
    half.write_text(json.dumps(asdict(part)))
    half.replace(done)
    return part


@functools.cache
def _loaded(path: str, template: str | None) -> tuple[tokenizer.Tokenizer, chat.Form]:
    words = tokenizer.load(Path(path).expanduser())
    return words, chat_template.form(words, template)


def _encode(
    read: Iterator[Document | Bad],
    words: tokenizer.Tokenizer,
    tokens: BinaryIO,
    masks: BinaryIO,
    lengths: BinaryIO,
) -> Part:
    """Stream documents into the three files: ids, a byte of mask a token, an int32 length a document."""
    dtype = indexed.token_dtype(words.vocab_size)
    count = total = learnt = masked = bad = 0
    named: list[Bad] = []
    formats, spelt = Counter[str](), 0
    written_out = [name for name in (*WRITTEN_OUT, *words.added) if len(name) > 2][:SOUGHT]
    for item in read:
        if isinstance(item, Bad):
            bad += 1
            if len(named) < NAMED_BAD:
                named.append(item)
            continue
        ids, mask = _ids(item, words)
        tokens.write(np.asarray(ids, dtype=dtype).tobytes())
        masks.write(mask)
        lengths.write(np.int32(len(ids)).tobytes())
        count, total, learnt = count + 1, total + len(ids), learnt + mask.count(1)
        masked += item.written is not None and 0 in mask
        formats[item.format] += 1
        if "<" in item.text or "[" in item.text:  # which spares most texts the search
            spelt += any(name in item.text for name in written_out)
    found = {"documents": count, "tokens": total, "learnt": learnt, "masked": masked, "bad": bad}
    return Part(**found, named=named, formats=dict(formats), spelt=spelt)


def _ids(item: Document, words: tokenizer.Tokenizer) -> tuple[list[int], bytes]:
    if item.written is not None:
        return item.written[0], bytes(item.written[1])
    ids = words.encode(item.text)
    if item.opens:
        ids.insert(0, words.bos)  # in place, so a book in one line isn't held three times
    if item.closes:
        ids.append(words.eos)
    return ids, b"\x01" * len(ids)


def _assemble(
    prefix: Path,
    work: Path,
    parts: list[Part],
    known: dict[str, Any],
    words: tokenizer.Tokenizer,
    files: list[Path],
) -> dict[str, Any]:
    """Join the parts, then put all files in place; a reader in between finds no description."""
    totals = {n: sum(getattr(p, n) for p in parts) for n in ("documents", "tokens", "learnt", "masked", "bad")}
    if not totals["documents"]:
        raise InputError(f"no document in {', '.join(map(str, files[:5]))}: every input is empty")
    bases = [work / f"{n:08d}" for n in range(len(parts))]
    lengths = np.concatenate([np.fromfile(b.with_suffix(".len"), dtype=np.int32) for b in bases])
    description = {"format": FORMAT, **known, **totals, "vocab_size": words.vocab_size}
    description |= {"tokenizer": tokenizer.digest(words), "inputs": [str(f) for f in files]}
    kinds = [("", ".bin", indexed.token_dtype(words.vocab_size))]
    if totals["masked"]:
        kinds.append(("_mask", ".mask", np.dtype(np.uint8)))
    for name, suffix, dtype in kinds:
        indexed.join([b.with_suffix(suffix) for b in bases], work / f"out{name}.bin")
        indexed.write_index(work / f"out{name}.idx", lengths, dtype)
    (work / "out.json").write_text(json.dumps(description, indent=1))
    # In this order a kill never leaves data that can be read without its mask.
    for stale in (".json", ".idx", "_mask.bin", "_mask.idx"):
        Path(f"{prefix}{stale}").unlink(missing_ok=True)
    for name in [f"{n}{s}" for n, _, _ in reversed(kinds) for s in (".bin", ".idx")] + [".json"]:
        (work / f"out{name}").replace(f"{prefix}{name}")
    return description


def _samples(prefix: Path, words: tokenizer.Tokenizer, count: int) -> Iterator[str]:
    """The first `count` documents as text, with what is learnt between guillemets."""
    if not count:
        return
    stored = dataset.Documents(prefix)
    for index in range(min(count, len(stored))):
        ids, mask = stored.read(index, 0, None)
        shown = _ends_of(show.pieces, words, ids, mask)
        yield f"document {index} ({len(ids)} tokens, {int(mask.sum())} learnt): {shown}"
        yield f"ids of document {index}: {_ends_of(show.numbers, words, ids, mask)}"


def _ends_of(shown: Callable[..., str], words: tokenizer.Tokenizer, ids: np.ndarray, mask: np.ndarray) -> str:
    """All of a document, or its begin and its end; in colours on a terminal."""
    whole = [slice(None)] if len(ids) <= 2 * SHOWN else [slice(SHOWN), slice(-SHOWN, None)]
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    return " ... ".join(shown(words, ids[part].tolist(), mask[part].tolist(), colour=colour) for part in whole)


def _explain(bad: int, named: list[tuple[Piece, Bad]], allowed: int) -> str:
    lines = "\n".join(f"  {p.file}:{_line(p, b)}: {b.reason}" for p, b in named)
    found = f"{bad} bad line" if bad == 1 else f"{bad} bad lines"
    return f"{found} (at most {allowed} allowed, --max-bad):\n{lines}"


def _line(piece: Piece, bad: Bad) -> int:
    """Line number within the file. It counts the lines before the piece, only for an error."""
    before = documents.lines(Piece(file=piece.file, start=0, end=piece.start, size=piece.size))
    return bad.line + (sum(1 for _ in before) if piece.start else 0)
