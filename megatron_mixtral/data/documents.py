"""Finds the input files of `prepare`, and streams their documents by byte ranges, in bounded memory.

A line of JSONL is a document. A plain text file is cut at blank lines into documents of about `TEXT_BYTES`. A file
with an unknown ending is JSONL if it begins like an object, so a model never learns JSON by mistake.
"""

import codecs
import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from megatron_mixtral.data import formats
from megatron_mixtral.data.formats import Fields, Row
from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat

RANGE_BYTES = 8 << 20  # one unit of parallel work
ZSTD_BYTES = 16 << 10  # decompressed at a time
ZSTD_WINDOW = 1 << 31  # the largest window, `zstd --long=31`; memory depends on the file's own window
TEXT_BYTES = 16 << 10  # about the size of a document of plain text
COMPRESSED = ("", ".gz", ".zst")
JSONL = tuple(kind + how for how in COMPRESSED for kind in (".jsonl", ".ndjson", ".json"))
TABLES = (".csv", ".tsv", ".parquet", *(kind + how for how in (".gz", ".zst") for kind in (".csv", ".tsv")))
WHOLE = ("array", "csv", "parquet")  # kinds that aren't cut into ranges
BLOCK = 1 << 20  # characters of an array that are read at a time
BETWEEN = re.compile(r"[\s,]*")
# A data set's description, which isn't data.
CARD = re.compile(
    r"(readme|license|licence|citation|changelog)(\..*)?|dataset_(infos?|dict)\.json|state\.json", re.I
)
SPLIT = re.compile(r"(?:^|[-_./])(train|test|validation|valid|val|dev|eval)(?=[-_./]|$)", re.I)
LONGEST_REASON = 200  # characters of a bad line that an error shows
TEXT = tuple(kind + how for how in COMPRESSED for kind in (".txt", ".md", ".rst"))


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

    format: str = "text"
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


def left_out(inputs: list[str]) -> list[str]:
    """What `find` leaves out of folders: a data set's card, and its other splits where it has a training split."""
    folders = [path for path in (Path(name).expanduser() for name in inputs) if path.is_dir()]
    return [str(path.relative_to(folder)) for folder in folders for path in _divided(folder)[1]]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        inside = _divided(path)[0]
        if not inside:
            raise InputError(f"{path}: no {', '.join((*JSONL, *TEXT, *TABLES))} in this folder, cards apart")
        return inside
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder")
    return [path]


def _divided(folder: Path) -> tuple[list[Path], list[Path]]:
    """A folder's files: those to read, and those that are left out."""
    inside = sorted(p for p in folder.rglob("*") if _is_input(p.relative_to(folder)) and p.is_file())
    cards = [p for p in inside if CARD.fullmatch(p.name)]
    data = [p for p in inside if p not in cards]
    splits = {p: found[1].lower() for p in data if (found := SPLIT.search(str(p.relative_to(folder))))}
    if "train" not in splits.values():
        return data, cards
    others = [p for p, split in splits.items() if split != "train"]
    return [p for p in data if p not in others], [*cards, *others]


def _is_input(path: Path) -> bool:
    known = path.name.lower().endswith((*JSONL, *TEXT, *TABLES))
    return known and not any(part.startswith(".") for part in path.parts)


def pieces(files: list[Path], range_bytes: int = RANGE_BYTES) -> list[Piece]:
    """Cut every file into ranges for the workers, in the order of the output."""
    cut: list[Piece] = []
    for file in files:
        size = file.stat().st_size
        step = size if _is_compressed(file) or _kind(file) in WHOLE else range_bytes
        starts = range(0, size, max(step, 1)) or range(1)
        cut += [Piece(file=file, start=s, end=min(s + max(step, 1), size), size=size) for s in starts]
    return cut


def read(piece: Piece, fields: Fields, form: chat.Form | None = None) -> Iterator[Document | Bad]:
    """The documents that begin in `piece`, in order; conversations as `form` writes them."""
    try:
        if _kind(piece.file) == "text":
            yield from _texts(piece)
        else:
            yield from _objects(piece, fields, form)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{piece.file}: damaged: {error}") from error


def _kind(file: Path) -> str:
    """lines, array, csv, parquet or text: by the name, and by how a file of JSON or of no known name begins."""
    name = file.name.lower()
    for suffix in (".gz", ".zst"):
        name = name.removesuffix(suffix)
    if name.endswith((".csv", ".tsv")):
        return "csv"
    if name.endswith(".parquet"):
        return "parquet"
    if name.endswith(TEXT):
        return "text"
    with _open(file) as stream:
        begin = stream.read(1 << 10).removeprefix(codecs.BOM_UTF8).split()
    if begin and begin[0].startswith(b"[") and b"".join(begin)[:2] in (b"[{", b"[]"):
        return "array"
    return "lines" if name.endswith(JSONL) or (begin and begin[0].startswith(b"{")) else "text"


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
    for number, row in rows(piece):
        try:
            yield document(json.loads(row) if isinstance(row, bytes) else row, fields, form)
        except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
            yield Bad(line=number, reason=str(error)[:LONGEST_REASON])


def values(piece: Piece) -> Iterator[tuple[int, Callable[[], Any]]]:
    """Each row with its line, and what reads it; a plain text is one row."""
    if _kind(piece.file) == "text":
        yield from ((1, partial(dict, text=d.text)) for d in _texts(piece) if isinstance(d, Document))
        return
    for number, row in rows(piece):
        yield number, partial(json.loads, row) if isinstance(row, bytes) else partial(dict, row)


def rows(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Each row with its line, or its number in a table: JSON that is still to be read as bytes, else the value."""
    kind = _kind(piece.file)
    if kind == "array":
        yield from _array(piece.file)
    elif kind == "csv":
        yield from _table(piece.file)
    elif kind == "parquet":
        yield from _parquet(piece.file)
    else:
        yield from ((n, line) for n, line in enumerate(lines(piece), start=1) if line.strip())


def _array(file: Path) -> Iterator[tuple[int, Any]]:
    """The elements of a JSON array, each as soon as it is whole: the file is never held at once."""
    decode, at, line, size = json.JSONDecoder().raw_decode, 0, 1, BLOCK
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="\n") as stream:
        text = stream.read(size)
        at = text.index("[") + 1
        while True:
            begin = BETWEEN.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing as well
            line += text.count("\n", at, begin)
            text, at = text[begin:], 0
            try:
                if text.startswith("]"):
                    break
                value, at = decode(text)
                if at == len(text) and (more := stream.read(size)):  # a number may go on
                    text, at = text + more, 0
                    continue
            except ValueError as error:
                if more := stream.read(max(size, len(text))):
                    text, at = text + more, 0
                    continue
                raise InputError(f"{file}:{line}: an array of JSON that can't be read: {error}") from error
            yield line, value
            line += text.count("\n", 0, at)
        if (text[1:] + stream.read()).strip():
            raise InputError(f"{file}:{line}: more text after the end of the array")


def _table(file: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of CSV whose first line names the columns; TSV by its name."""
    tabs = ".tsv" in file.suffixes
    csv.field_size_limit(sys.maxsize)
    with io.TextIOWrapper(_open(file), encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, delimiter="\t" if tabs else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{file}:{reader.line_num}: another number of columns than the first line names"
                    )
                yield reader.line_num, dict(row)
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{file}:{reader.line_num + 1}: {error}") from error


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(f"{file}: reading parquet needs `pip install pyarrow`") from error
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except pyarrow.ArrowException as error:
        raise InputError(f"{file}: not parquet, or damaged: {error}") from error


def document(value: Any, fields: Fields, form: chat.Form | None) -> Document:
    """One row as a document; `ValueError` lists the fields that it needs."""
    row = formats.read(value, fields)
    if row.messages is not None:
        return _conversation(row, form)
    if row.ids is not None:
        learnt = row.learnt if row.learnt is not None else [1] * len(row.ids)
        return Document(format=row.format, written=(row.ids, learnt))
    assert row.text is not None
    row.text.encode()  # JSON can encode half a character, which isn't text
    return Document(format=row.format, text=row.text)


def _conversation(row: Row, form: chat.Form | None) -> Document:
    assert form is not None, "a caller that reads conversations says how they are written"
    json.dumps(row.messages, ensure_ascii=False).encode()
    return Document(format=row.format, written=form.example(row.messages, row.tools))


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
