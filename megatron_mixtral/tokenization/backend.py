"""The `tokenizers.Tokenizer` that transformers makes of a folder: its ids without importing it.

A folder with `tokenizer.json` has it in there; of a `tokenizer.model` alone it is built, as transformers builds it.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization.settings import NAMED, Added, Settings, content

SPACE = "▁"
CONTROL, USER_DEFINED = 3, 4  # SentencePiece's kinds of pieces


def from_hub_file(file: Path, settings: Settings) -> tuple[Any, Any]:
    """`tokenizer.json` with the tokens that the other files add; and its vocabulary and steps without any."""
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise InputError(f"{file}: not a tokenizer: {error}") from error
    model.no_truncation()
    model.no_padding()
    plain = copy(model, model.normalizer, model.pre_tokenizer)
    if settings.llama is not None:
        model = _llama(model, settings)
    return _with_added(model, settings.added, settings.named, settings.extra), plain


def copy(model: Any, normalizer: Any, pre_tokenizer: Any, added: Iterable[Any] = ()) -> Any:
    """A `tokenizers.Tokenizer` with the same vocabulary, and with `added` of its tokens alone."""
    import tokenizers

    made = tokenizers.Tokenizer(model.model)
    made.normalizer, made.pre_tokenizer = normalizer, pre_tokenizer
    made.add_tokens(list(added))
    return made


def from_pieces(file: Path, settings: Settings) -> Any:
    """What transformers makes of a `tokenizer.model`: it puts no space before the text, as SentencePiece does."""
    pieces = list(_pieces(file))
    names = [piece for piece, _ in pieces]
    shown = [(name, kind) for name, kind in pieces if kind in (CONTROL, USER_DEFINED)]
    listed = [Added(content=name, special=kind == CONTROL) for name, kind in shown]
    model = _bpe(names, settings.added if settings.llama is None else {})
    model = model if settings.llama is None else _llama(model, settings)
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | settings.named
    return _with_added(model, settings.added, named, settings.extra if settings.extra_known else tuple(listed))


def _with_added(model: Any, added: dict[int, Added], named: dict[str, Any], extra: tuple[str | Added, ...]) -> Any:
    """Tokens join in transformers' order: those with ids, named ones, extra ones, each at the next free id."""
    known = {token.content for token in model.get_added_tokens_decoder().values()}
    joining: list[str | Added] = [added[index] for index in sorted(added)]
    known |= {content(token) for token in joining}
    for token in (*_in_order(named), *extra):
        if content(token) not in known and token not in joining:
            joining.append(token)
    roles = {content(token) for token in named.values()}
    if joining:
        model.add_tokens([_joined(token, roles) for token in joining])
    return model


def _in_order(named: dict[str, Any]) -> Iterator[str | Added]:
    yield from (named[key] for key in NAMED if key in named)
    yield from (token for key, token in named.items() if key not in NAMED)


def _joined(token: str | Added, roles: set[str]) -> Any:
    from tokenizers import AddedToken

    if isinstance(token, str):
        return AddedToken(token, special=True)
    flags = {name: value for name, value in asdict(token).items() if name != "content"}
    return AddedToken(token.content, **flags | {"special": token.special or token.content in roles})


def _llama(model: Any, settings: Settings) -> Any:
    """LlamaTokenizer takes the vocabulary alone and puts spaces its own way."""
    from tokenizers import Tokenizer, pre_tokenizers

    known = json.loads(model.to_str())
    asked = settings.llama or {}
    prefixed = asked.get("add_prefix_space") is not False
    scheme = ("always" if asked.get("legacy") else "first") if prefixed else "never"
    known |= {"normalizer": None, "added_tokens": [], "truncation": None, "padding": None}
    known["model"] |= {"unk_token": None, "fuse_unk": True, "byte_fallback": True, "dropout": None}
    made = Tokenizer.from_str(json.dumps(known))
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    return made


def _bpe(names: list[str], added: dict[int, Added]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    vocab = {name: index for index, name in enumerate(names)}
    merges = _merges(vocab)
    for index, token in added.items():  # a placeholder that has got a name
        if index < len(names) and names[index] != token.content and token.content not in vocab:
            vocab[token.content] = vocab.pop(names[index])
    model = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    model.normalizer = normalizers.Sequence([normalizers.Replace(" ", SPACE)])
    model.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return model


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others; the piece with the lower id first, then the shorter left half."""
    found = []
    for piece, rank in vocab.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        found += [(rank, len(a), len(b), vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
    return [(a, b) for *_, a, b in sorted(found)]


def _pieces(file: Path) -> Iterator[tuple[str, int]]:
    """Each piece of a SentencePiece model with its kind, read without protobuf's library."""
    data = file.read_bytes()
    try:
        for number, value in _fields(data):
            if number == 1:
                parts = dict(_fields(value))
                yield parts[1].decode(), parts.get(3, 1)
    except (IndexError, KeyError, struct.error, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InputError(f"{file}: not a SentencePiece model: {error}") from error


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: ints as such, all else as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        if key & 7 == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        length, at = _varint(data, at) if key & 7 == 2 else ({1: 8, 5: 4}[key & 7], at)
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
