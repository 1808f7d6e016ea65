"""Find a preparation's input files and stream their documents, a byte range at a time, in bounded memory.

A line of JSONL is a document; a plain text file is cut at blank lines into documents of about `TEXT_BYTES`.
"""

import gzip
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixtral import chat
from megatron_mixtral.errors import InputError

INSTRUCT = chat.Instruct()
RANGE_BYTES = 8 << 20  # one unit of parallel work
TEXT_BYTES = 16 << 10  # a document of a plain text file, about
JSONL = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")
LONGEST_REASON = 200  # characters that say what is wrong with a line
TEXT = (".txt", ".md", ".rst")


@dataclass(frozen=True, kw_only=True)
class Fields:
    """Where a JSON object keeps its text; the first that is there decides what the document is."""

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes start <= b < end of a file, moved forward to the next separator; a compressed file is one piece."""

    file: Path
    start: int
    end: int
    size: int  # of the whole file


@dataclass(frozen=True, kw_only=True)
class Document:
    """Text, or a conversation's turns; `opens`/`closes` tell a cut text file's first and last part."""

    text: str = ""
    turns: tuple[chat.Turn, ...] = ()
    opens: bool = True
    closes: bool = True


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A line that is no document; `line` counts from 1 within its piece."""

    line: int
    reason: str


def find(inputs: list[str]) -> list[Path]:
    """Files named by `inputs`, a folder standing for the files in it; `InputError` names what isn't there."""
    found: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and p.name.endswith((*JSONL, *TEXT)))
            if not inside:
                raise InputError(f"{path}: no {', '.join((*JSONL, *TEXT))} in this folder")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise InputError(f"{path}: no such file or folder")
    if not found:
        raise InputError("inputs: nothing to prepare")
    return found


def pieces(files: list[Path], range_bytes: int = RANGE_BYTES) -> list[Piece]:
    """Cut every file into ranges that workers take; order is the order of the output."""
    cut: list[Piece] = []
    for file in files:
        size = file.stat().st_size
        step = size if file.suffix in (".gz", ".zst") else range_bytes
        starts = range(0, size, max(step, 1)) or range(1)
        cut += [Piece(file=file, start=s, end=min(s + max(step, 1), size), size=size) for s in starts]
    return cut


def read(piece: Piece, fields: Fields, form: chat.Form = INSTRUCT) -> Iterator[Document | Bad]:
    """The documents that begin in `piece`, in order; conversations in the turns that `form` makes of them."""
    if piece.file.name.endswith(JSONL):
        yield from _objects(piece, fields, form)
    else:
        yield from _texts(piece)


def lines(piece: Piece) -> Iterator[bytes]:
    """Whole lines that begin in `piece`: the one cut by `start` belongs to the piece before."""
    return (line for line, _ in _lines(piece))


def _lines(piece: Piece) -> Iterator[tuple[bytes, bool]]:
    """Each line with whether it is the file's last."""
    with _open(piece.file) as stream:
        if piece.file.suffix in (".gz", ".zst"):
            yield from ((line, not stream.peek(1)) for line in stream)  # type: ignore[attr-defined]
            return
        position = piece.start
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < piece.end and (line := stream.readline()):
            position += len(line)
            yield line, position >= piece.size


def _open(file: Path) -> BinaryIO:
    if file.suffix == ".gz":
        return gzip.open(file, "rb")  # type: ignore[return-value]
    if file.suffix == ".zst":
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"{file}: reading .zst needs `pip install zstandard`") from error
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(file.open("rb"), closefd=True))
    return file.open("rb", buffering=1 << 20)


def _objects(piece: Piece, fields: Fields, form: chat.Form) -> Iterator[Document | Bad]:
    for number, line in enumerate(lines(piece), start=1):
        if not line.strip():
            continue
        try:
            found = document(json.loads(line), fields, form)
            for text in (found.text, *(content for _, content in found.turns)):
                text.encode()  # JSON can write half a character, which is no text
            yield found
        except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
            yield Bad(line=number, reason=str(error)[:LONGEST_REASON])


def document(value: Any, fields: Fields, form: chat.Form) -> Document:
    """One JSON object as a document; `ValueError` lists the fields that would have made it one."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value).__name__}")
    if fields.messages in value:
        return Document(turns=tuple(form.from_messages(value[fields.messages])))
    if fields.prompt in value and fields.completion in value:
        pair = [("user", value[fields.prompt]), ("assistant", value[fields.completion])]
        return Document(turns=tuple(form.from_messages([{"role": r, "content": c} for r, c in pair])))
    text = value.get(fields.text)
    if not isinstance(text, str):
        raise ValueError(
            f"has none of: {fields.text!r} (text), {fields.messages!r}, {fields.prompt!r} with "
            f"{fields.completion!r}; it has {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
        )
    if not text.strip():
        raise ValueError(f"{fields.text!r} is empty")
    return Document(text=text)


def _texts(piece: Piece) -> Iterator[Document | Bad]:
    """Plain text: lines gathered until they are `TEXT_BYTES` and a blank line comes; nothing is lost or added.

    Text without blank lines is cut at a line's end once it is four times as long. Text that spans two pieces
    becomes two documents of one file, as at any other cut.
    """
    gathered: list[bytes] = []
    size, first, opens, last = 0, 1, piece.start == 0, False
    for number, (line, last) in enumerate(_lines(piece), start=1):  # noqa: B007 (read after the loop)
        if size >= 4 * TEXT_BYTES or (size >= TEXT_BYTES and not gathered[-1].strip()):
            yield from _text(gathered, first, opens=opens, closes=False)
            gathered, size, first, opens = [], 0, number, False
        gathered.append(line)
        size += len(line)
    if gathered:
        yield from _text(gathered, first, opens=opens, closes=last)


def _text(gathered: list[bytes], first: int, *, opens: bool, closes: bool) -> Iterator[Document | Bad]:
    try:
        text = b"".join(gathered).decode("utf-8-sig" if opens else "utf-8")
    except UnicodeDecodeError as error:
        line = first + b"".join(gathered)[: error.start].count(b"\n")
        yield Bad(line=line, reason=f"not UTF-8: {error.reason}")
        return
    if text.strip():
        yield Document(text=text, opens=opens, closes=closes)
