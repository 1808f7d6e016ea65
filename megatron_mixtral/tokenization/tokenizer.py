"""Text to token ids and back, from a hub folder, a `tokenizer.json` or a `tokenizer.model`, without transformers.

Text is only ever text: `</s>` written by a user is encoded as its characters, never as the control token. Ids are
those of transformers; for text that isn't a conversation, a folder without `tokenizer.json` has SentencePiece's.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import backend, jinja_world, settings, word_cache
from megatron_mixtral.tokenization.settings import Settings, content

Spans = list[tuple[int, int]]  # of each token: begin and end in the text, in characters


class Tokenizer(Protocol):
    """What both kinds offer; ids are 0 <= id < vocab_size."""

    vocab_size: int
    bos: int
    eos: int
    ends: tuple[int, ...]  # what ends an answer: where `generate` stops, and `eos`
    named: dict[str, str]  # what templates know as bos_token, eos_token and the like
    templates: dict[str, str]  # chat templates by name
    control: dict[str, int]  # control tokens by name: nobody's words become one
    silent: frozenset[int]  # ids that are no text
    added: dict[str, int]  # all tokens that are looked for before the vocabulary is
    notes: tuple[str, ...]  # where files contradict each other, and whose word is taken

    def __hash__(self) -> int: ...

    @property
    def chat_template(self) -> str | None: ...

    @property
    def matched(self) -> dict[str, bool]:
        """The tokens that are looked for in what a template wrote, and whether each is special."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no control token is added."""

    def at_once(self, text: str) -> list[int]:
        """As `encode`, without the table of words, which a text of rare ones would fill."""

    def sentencepiece(self, text: str) -> list[int]:
        """The same with the one space that SentencePiece, and so mistral-common, puts before every text."""

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, index: int) -> str: ...

    def rendered(self, text: str) -> tuple[list[int], Spans]:
        """Ids of a conversation that a template wrote, control tokens and all, each with its place in `text`."""

    def spelt(self, text: str) -> tuple[list[int], Spans]:
        """As `rendered`, but no token is looked for: everything is characters."""


FILES = ("tokenizer.json", "tokenizer.model")  # what transformers takes first


def load(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a folder with tokenizer.json or tokenizer.model, or either file itself."""
    if found := find(path):
        return found
    raise InputError(f"{path}: no tokenizer here; expected a folder with {' or '.join(FILES)}, or such a file")


def find(path: Path) -> Tokenizer | None:
    """As `load`, but None where there is none."""
    files = [path / name for name in FILES] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    return _made(file, settings.stamp(file.parent), file.stat().st_mtime_ns) if file else None


@functools.lru_cache(4)
def _made(file: Path, *_stamps: Any) -> Tokenizer:
    """As long as neither it nor what lies beside it changes."""
    return HubTokenizer(file) if file.suffix == ".json" else PieceTokenizer(file)


@functools.lru_cache(4)
def digest(tokenizer: Tokenizer) -> str:
    """Of the table of pieces: the same for every file form of one vocabulary."""
    table = hashlib.sha256()
    for index in range(tokenizer.vocab_size):
        table.update(tokenizer.piece(index).encode("utf-8", "surrogatepass") + b"\n")
    return table.hexdigest()


@functools.lru_cache(4)
def ids_digest(tokenizer: Tokenizer, *, rendered: bool) -> str:
    """Of all that changes ids: of text, or with `rendered` of conversations that a template writes.

    Every piece is encoded, so that another order of merges shows as well.
    """
    text = "\n".join(tokenizer.piece(index).replace("▁", " ") for index in range(tokenizer.vocab_size))
    found: list[Any] = [digest(tokenizer), tokenizer.bos, tokenizer.eos, sorted(tokenizer.control.items())]
    texts = ["", " a", "  a", "a", text]
    if rendered:
        texts += [f"a {name} a{name}\n {name}" for name in sorted(tokenizer.matched)]
        found += [sorted(tokenizer.matched.items()), [tokenizer.rendered(text)[0] for text in texts]]
    else:
        found += [tokenizer.at_once(text) for text in texts]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


class _Common:
    """What follows from the settings of a folder and its `tokenizers.Tokenizer`."""

    control: dict[str, int]
    added: dict[str, int]
    templates: dict[str, str]

    @property
    def chat_template(self) -> str | None:
        return self.templates.get(settings.DEFAULT)

    @functools.cached_property
    def hub(self) -> Any:
        """The `tokenizers.Tokenizer` that transformers would make."""
        raise NotImplementedError

    def rendered(self, text: str) -> tuple[list[int], Spans]:
        found = self.hub.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    def spelt(self, text: str) -> tuple[list[int], Spans]:
        found = self._without_added.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @functools.cached_property
    def matched(self) -> dict[str, bool]:
        return {token.content: token.special for token in self.hub.get_added_tokens_decoder().values()}

    @functools.cached_property
    def _without_added(self) -> Any:
        return backend.copy(self.hub, self.hub.normalizer, self.hub.pre_tokenizer)

    @functools.cached_property
    def _ordinary(self) -> re.Pattern[str] | None:
        """Added tokens that are words like others, since no template writes them and none is special."""
        names = [name for name in self.added if name not in self.control]
        return names_pattern(names) if names else None

    def _ordinary_tokens(self) -> list[Any]:
        listed = sorted(self.hub.get_added_tokens_decoder().items())
        return [token for _, token in listed if token.content not in self.control]

    def _settle(
        self, found: Settings, named: Callable[[str], int | None], file: Path
    ) -> tuple[int, int, tuple[int, ...]]:
        """Begin, end, and all ids that end an answer."""
        ids = []
        for key, usual in (("bos_token", "<s>"), ("eos_token", "</s>")):
            name = content(found.named.get(key, usual))
            index = named(name)
            if index is None:
                raise InputError(f"{file}: {key} {name!r} isn't in its vocabulary")
            ids.append(index)
        return ids[0], ids[1], tuple(dict.fromkeys((*found.ends, ids[1])))


def names_pattern(names: list[str]) -> re.Pattern[str]:
    """Any of `names`, the longest first; the look ahead spares most characters the many comparisons."""
    firsts = "".join(sorted({re.escape(name[0]) for name in names}))
    return re.compile(
        f"(?=[{firsts}])(?:{'|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))})"
    )


def _control(added: dict[int, Any], templates: dict[str, str], always: dict[str, int]) -> dict[str, int]:
    """transformers' own rule: special tokens, and other added ones that the folder's template writes."""
    written = "\0".join(jinja_world.literals(source) for source in templates.values())
    return always | {
        token.content: index
        for index, token in added.items()
        if token.special or (token.content in written and not token.content.isspace())
    }


def _named(found: Settings, usual: bool) -> dict[str, str]:
    """Tokens by their role; where no tokenizer.json says what there is, transformers takes the usual ones."""
    names = {key: content(token) for key, token in found.named.items()}
    return {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"} | names if usual else names


def _end_notes(words: Tokenizer, found: Settings) -> Iterator[str]:
    if found.ends and words.eos not in found.ends:
        said = ", ".join(
            f"{words.piece(index) if index < words.vocab_size else '?'} ({index})" for index in found.ends
        )
        yield (
            f"the tokenizer's end token is {words.piece(words.eos)} ({words.eos}), {found.ends_file} says {said}: "
            "answers may end with either, and servers stop at both"
        )


def _steps(model: Any) -> tuple[Any, Any]:
    """What is done to text, and how it is cut, before the vocabulary is looked at."""
    import tokenizers

    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    empty.normalizer, empty.pre_tokenizer = model.normalizer, model.pre_tokenizer
    known = json.loads(empty.to_str())
    return known["normalizer"], known["pre_tokenizer"]


class HubTokenizer(_Common):
    """A `tokenizer.json`, with what the files beside it say."""

    def __init__(self, file: Path) -> None:
        found = settings.read(file.parent, hub_file=file)
        self.hub, self._text = model, _ = backend.from_hub_file(file, found)
        model.encode_special_tokens = found.split_special
        listed = model.get_added_tokens_decoder()
        self._pieces = {index: piece for piece, index in model.get_vocab(with_added_tokens=True).items()}
        self.vocab_size = max(self._pieces) + 1
        self.bos, self.eos, self.ends = self._settle(found, model.token_to_id, file)
        self.named, self.templates = _named(found, found.llama is not None), found.templates
        self.added = {token.content: index for index, token in listed.items()}
        self.control = _control(
            listed, found.templates, {self.piece(index): index for index in (self.bos, self.eos)}
        )
        special = (index for index, token in listed.items() if token.special)
        self.silent = frozenset((*special, self.bos, self.eos, *self.ends))
        self.notes = (*found.notes, *_end_notes(self, found), *self._other_pieces(file))

    def encode(self, text: str) -> list[int]:
        if self._ordinary is not None and self._ordinary.search(text):
            return self._plain.encode(text, add_special_tokens=False).ids
        return self._words.encode(text)

    def at_once(self, text: str) -> list[int]:
        return self._plain.encode(text, add_special_tokens=False).ids

    def sentencepiece(self, text: str) -> list[int]:
        return self._spaced.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.hub.decode(ids)

    def piece(self, index: int) -> str:
        return self._pieces.get(index, "")

    @functools.cached_property
    def _plain(self) -> Any:
        """Without control tokens."""
        return backend.copy(self._text, self._text.normalizer, self._text.pre_tokenizer, self._ordinary_tokens())

    @functools.cached_property
    def _words(self) -> word_cache.SentencePiece | word_cache.Words:
        return self._quickest(self._text, _opening(*_steps(self._text)))

    @functools.cached_property
    def _spaced(self) -> word_cache.SentencePiece | word_cache.Words:
        from tokenizers import normalizers

        if _opening(*_steps(self._text)) in (None, word_cache.spaced):
            return self._words
        steps = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return self._quickest(backend.copy(self._text, steps, None), word_cache.spaced)

    def _quickest(
        self, model: Any, opening: Callable[[str], str] | None
    ) -> word_cache.SentencePiece | word_cache.Words:
        """The quickest way to the ids of `model`, which does `opening` to a text's begin."""
        from tokenizers import normalizers

        whole = _Whole(model, [self.piece(index) for index in range(self.vocab_size)])
        if opening is None:
            return whole
        inside = _Whole(backend.copy(model, normalizers.Replace(" ", word_cache.SPACE), None), [])
        apart = word_cache.Words(whole, inside.encode, opening)
        return apart if word_cache.serves(whole, apart) else whole

    def _other_pieces(self, file: Path) -> Iterator[str]:
        """Whether a tokenizer.model beside it is another's."""
        beside = file.parent / "tokenizer.model"
        if not beside.is_file():
            return
        try:
            model = _sentencepiece(beside)
        except InputError:
            return  # nobody reads it
        size = model.vocab_size()
        if any(self.piece(index) != model.id_to_piece(index) for index in range(size)):
            yield "tokenizer.model has other pieces than tokenizer.json; transformers takes the latter"


class _Whole:
    """`encode` by a `tokenizers.Tokenizer` as `word_cache` asks for it."""

    def __init__(self, model: Any, pieces: list[str]) -> None:
        self._model, self._pieces = model, pieces

    def vocab_size(self) -> int:
        return len(self._pieces)

    def id_to_piece(self, index: int) -> str:
        return self._pieces[index]

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids


def _opening(before: Any, cut: Any) -> Callable[[str], str] | None:
    """What is done to a text's begin; None for a tokenizer that does more to text than spaces."""
    steps = [before] if before and before["type"] != "Sequence" else (before or {"normalizers": []})["normalizers"]
    kinds = [step["type"] for step in steps]
    spaces = all(s["pattern"] == {"String": " "} and s["content"] == "▁" for s in steps if s["type"] == "Replace")
    if not spaces:
        return None
    if cut is None and kinds == ["Prepend", "Replace"] and steps[0]["prepend"] == "▁":
        return word_cache.spaced
    if cut is None and kinds == ["Replace"]:
        return str
    if kinds in ([], ["Replace"]) and cut and cut["type"] == "Metaspace" and not cut["split"]:
        return str if cut["prepend_scheme"] == "never" else _once_spaced
    return None


def _once_spaced(text: str) -> str:
    return text if text.startswith((" ", "▁")) else f" {text}"


@functools.cache
def _sentencepiece(file: Path) -> Any:
    import sentencepiece

    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{file}: not a SentencePiece model: {error}") from error


class PieceTokenizer(_Common):
    """A SentencePiece model: what mistral-common uses itself, with the tokens that the files beside it add."""

    def __init__(self, file: Path) -> None:
        self._file, self._found = file, settings.read(file.parent, hub_file=None)
        self._model = model = _sentencepiece(file)
        self._words = word_cache.Words(model) if word_cache.serves(model) else model
        if model.bos_id() < 0 or model.eos_id() < 0:
            raise InputError(f"{file}: has no begin or end token")
        self._size = model.vocab_size()
        names = [content(t) for t in (*self._found.named.values(), *self._found.extra, *self._found.added.values())]
        self._extended = any(self._id(name) is None for name in names)
        listed = self.hub.get_added_tokens_decoder() if self._extended else {}
        self._more = {index: token.content for index, token in listed.items() if index >= self._size}
        self.vocab_size = max((self._size - 1, *self._more)) + 1
        by_name = {name: index for index, name in self._more.items()}
        self.bos, self.eos, self.ends = self._settle(
            self._found, lambda name: by_name.get(name, self._id(name)), file
        )
        self.named, self.templates = _named(self._found, True), self._found.templates
        control = {model.id_to_piece(n): n for n in range(self._size) if model.is_control(n) or model.is_unknown(n)}
        control |= {self.piece(index): index for index in (self.bos, self.eos)}
        self.added = control | {token.content: index for index, token in listed.items()}
        self.control = _control(listed, self.templates, control)
        special = (index for index, token in listed.items() if token.special)
        self.silent = frozenset((*control.values(), *special, *self.ends))
        self.notes = (*self._found.notes, *_end_notes(self, self._found))

    @functools.cached_property
    def hub(self) -> Any:
        model = backend.from_pieces(self._file, self._found)
        model.encode_special_tokens = self._found.split_special
        return model

    def encode(self, text: str) -> list[int]:
        if self._ordinary is not None and self._ordinary.search(text):
            return self._plain.encode(text, add_special_tokens=False).ids
        return self.sentencepiece(text)

    def at_once(self, text: str) -> list[int]:
        return self._model.encode(text) if self._ordinary is None else self.encode(text)

    def sentencepiece(self, text: str) -> list[int]:
        return self._words.encode(text)

    def decode(self, ids: list[int]) -> str:
        if not self._more:
            return self._model.decode(ids)
        runs = itertools.groupby(ids, lambda index: index < self._size)
        return "".join(
            self._model.decode(list(run)) if own else "".join(self.piece(n) for n in run if n not in self.silent)
            for own, run in runs
        )

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index) if index < self._size else self._more.get(index, "")

    @functools.cached_property
    def _plain(self) -> Any:
        """Without control tokens, and with the space that SentencePiece puts first."""
        from tokenizers import normalizers

        spaced = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return backend.copy(self.hub, spaced, None, self._ordinary_tokens())

    def _id(self, name: str) -> int | None:
        index = self._model.piece_to_id(name)
        return index if self._model.id_to_piece(index) == name else None
