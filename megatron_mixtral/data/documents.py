"""Finds the input files of `prepare`, and streams their documents by byte ranges, in bounded memory.

A line of JSONL is a document. A plain text file is cut at blank lines into documents of about `TEXT_BYTES`. A file
with an unknown ending is JSONL if it begins like an object, so a model never learns JSON by mistake.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat

RANGE_BYTES = 8 << 20  # one unit of parallel work
ZSTD_BYTES = 16 << 10  # decompressed at a time
ZSTD_WINDOW = 1 << 31  # the largest window, `zstd --long=31`; memory depends on the file's own window
TEXT_BYTES = 16 << 10  # about the size of a document of plain text
COMPRESSED = ("", ".gz", ".zst")
JSONL = tuple(kind + how for how in COMPRESSED for kind in (".jsonl", ".ndjson", ".json"))
LONGEST_REASON = 200  # characters of a bad line that an error shows
TEXT = tuple(kind + how for how in COMPRESSED for kind in (".txt", ".md", ".rst"))


@dataclass(frozen=True, kw_only=True)
class Fields:
    """The keys of a JSON object; the first one that exists decides the kind of document."""

    text: str = "text"
    messages: str = "messages"
    prompt: str = "prompt"
    completion: str = "completion"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Bytes start <= b < end of a file, both moved to the next separator; a compressed file is one piece."""

    file: Path
    start: int
    end: int
    size: int  # of the whole file


@dataclass(frozen=True, kw_only=True)
class Document:
    """Text, or a conversation's ids and mask; `opens` and `closes` mark the first and last part of a text file."""

    text: str = ""
    written: chat.Written | None = None
    opens: bool = True
    closes: bool = True


@dataclass(frozen=True, kw_only=True)
class Bad:
    """A line that isn't a document; `line` counts from 1 within its piece."""

    line: int
    reason: str


def find(inputs: list[str]) -> list[Path]:
    """Files named by `inputs`, a folder means its files that aren't hidden; `InputError` names a missing one."""
    found: list[Path] = []
    for name in inputs:
        path = Path(name).expanduser()
        try:
            found += _files(path)
        except OSError as error:
            raise InputError(f"{error.filename or path}: {error.strerror}") from error
    if not found:
        raise InputError("inputs: nothing to prepare")
    return found


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = sorted(p for p in path.rglob("*") if _is_input(p.relative_to(path)) and p.is_file())
        if not inside:
            raise InputError(f"{path}: no {', '.join((*JSONL, *TEXT))} in this folder")
        return inside
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [path]


def _is_input(path: Path) -> bool:
    return path.name.lower().endswith((*JSONL, *TEXT)) and not any(part.startswith(".") for part in path.parts)


def pieces(files: list[Path], range_bytes: int = RANGE_BYTES) -> list[Piece]:
    """Cut every file into ranges for the workers, in the order of the output."""
    cut: list[Piece] = []
    for file in files:
        size = file.stat().st_size
        step = size if _is_compressed(file) else range_bytes
        starts = range(0, size, max(step, 1)) or range(1)
        cut += [Piece(file=file, start=s, end=min(s + max(step, 1), size), size=size) for s in starts]
    return cut


def read(piece: Piece, fields: Fields, form: chat.Form | None = None) -> Iterator[Document | Bad]:
    """The documents that begin in `piece`, in order; conversations as `form` writes them."""
    try:
        if _is_jsonl(piece.file):
            yield from _objects(piece, fields, form)
        else:
            yield from _texts(piece)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{piece.file}: damaged: {error}") from error


def _is_jsonl(file: Path) -> bool:
    name = file.name.lower()
    if name.endswith((*JSONL, *TEXT)):
        return name.endswith(JSONL)
    with _open(file) as stream:
        return stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{")


def _is_compressed(file: Path) -> bool:
    return file.suffix.lower() in (".gz", ".zst")


def lines(piece: Piece) -> Iterator[bytes]:
    """Whole lines that begin in `piece`; a line that `start` cuts belongs to the previous piece."""
    return (line for line, _ in _lines(piece))


def _lines(piece: Piece) -> Iterator[tuple[bytes, bool]]:
    """Each line with whether it is the file's last."""
    with _open(piece.file) as stream:
        if _is_compressed(piece.file):
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
    try:
        if file.suffix.lower() == ".gz":
            return gzip.open(file, "rb")  # type: ignore[return-value]
        if file.suffix.lower() == ".zst":
            return io.BufferedReader(_Zstd(file), 1 << 20)
        return file.open("rb", buffering=1 << 20)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error


class _Zstd(io.RawIOBase):
    """The frames of a file, one after another; `EOFError` if the last frame is cut short."""

    def __init__(self, file: Path) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise InputError(f"{file}: reading .zst needs `pip install zstandard`") from error
        self._file, self._failure = file.open("rb"), zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj
        self._frame: Any = None  # one that is under way
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            block = self._frame.unused_data if self._frame and self._frame.eof else b""
            if not (block := block or self._file.read(ZSTD_BYTES)):
                if self._frame and not self._frame.eof:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._frame = self._new_frame()
            try:
                self._ready = memoryview(self._frame.decompress(block))
            except self._failure as error:
                raise EOFError(str(error)) from error
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _objects(piece: Piece, fields: Fields, form: chat.Form | None) -> Iterator[Document | Bad]:
    for number, line in enumerate(lines(piece), start=1):
        if not line.strip():
            continue
        try:
            yield document(json.loads(line), fields, form)
        except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
            yield Bad(line=number, reason=str(error)[:LONGEST_REASON])


def document(value: Any, fields: Fields, form: chat.Form | None) -> Document:
    """One JSON object as a document; `ValueError` lists the fields that it needs."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object on each line, got {type(value).__name__}")
    value = {name: one for name, one in value.items() if one is not None}
    if fields.messages in value:
        return _conversation(value[fields.messages], value, form)
    if fields.prompt in value and fields.completion in value:
        pair = [("user", value[fields.prompt]), ("assistant", value[fields.completion])]
        return _conversation([{"role": role, "content": content} for role, content in pair], value, form)
    text = value.get(fields.text)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{fields.text!r} is {type(text).__name__}, not text")
    if text is None:
        raise ValueError(
            f"has none of: {fields.text!r} (text), {fields.messages!r}, {fields.prompt!r} with "
            f"{fields.completion!r}; it has {', '.join(map(repr, list(value)[:8])) or 'nothing'}"
        )
    if not text.strip():
        raise ValueError(f"{fields.text!r} is empty")
    text.encode()  # JSON can write half a character, which is no text
    return Document(text=text)


def _conversation(messages: Any, row: dict[str, Any], form: chat.Form | None) -> Document:
    assert form is not None, "a caller that reads conversations says how they are written"
    json.dumps(messages, ensure_ascii=False).encode()
    return Document(written=form.example(messages, row.get("tools")))


def _texts(piece: Piece) -> Iterator[Document | Bad]:
    """Plain text as documents: each ends at the first blank line after `TEXT_BYTES`; nothing is lost or added.

    Text without blank lines is cut at a line end after four times as many bytes. Text over two pieces becomes two
    documents.
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
