"""Text to token ids and back, from a hub folder or a bare `tokenizer.model`, without importing transformers.

Text is only ever text: `</s>` written by a user is encoded as its characters, never as the control token.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import word_cache


class Tokenizer(Protocol):
    """What both kinds offer; ids are 0 <= id < vocab_size."""

    vocab_size: int
    bos: int
    eos: int
    chat_template: str | None
    control: dict[str, int]  # its control tokens by name

    def encode(self, text: str) -> list[int]:
        """Ids of `text` alone: no control token is added."""

    def decode(self, ids: list[int]) -> str: ...

    def piece(self, index: int) -> str: ...


FILES = ("tokenizer.model", "tokenizer.json")  # the reference first


def load(path: Path) -> Tokenizer:
    """The tokenizer at `path`: a folder with tokenizer.model or tokenizer.json, or either file itself."""
    if found := find(path):
        return found
    raise InputError(f"{path}: no tokenizer here; expected a folder with {' or '.join(FILES)}, or such a file")


def find(path: Path) -> Tokenizer | None:
    """As `load`, but None where there is none."""
    files = [path / name for name in FILES] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            kind = HubTokenizer if file.suffix == ".json" else PieceTokenizer
            return kind(file, _settings(file.parent))
    return None


def digest(tokenizer: Tokenizer) -> str:
    """The same for every file form of one vocabulary, so that data can be matched with a model's tokenizer."""
    table = hashlib.sha256()
    for index in range(tokenizer.vocab_size):
        table.update(tokenizer.piece(index).encode("utf-8", "surrogatepass") + b"\n")
    return table.hexdigest()


class PieceTokenizer:
    """A SentencePiece model: the reference for Mixtral, and what mistral-common uses itself."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except RuntimeError as error:
            raise InputError(f"{file}: not a SentencePiece model: {error}") from error
        self._words = word_cache.Words(self._model) if word_cache.serves(self._model) else self._model
        self.bos: int = self._model.bos_id()
        self.eos: int = self._model.eos_id()
        self.chat_template: str | None = settings.get("chat_template")
        if self.bos < 0 or self.eos < 0:
            raise InputError(f"{file}: has no begin or end token")
        self.control = {self.piece(index): index for index in (self.bos, self.eos)}
        self.vocab_size: int = self._model.vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._words.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece(self, index: int) -> str:
        return self._model.id_to_piece(index)


class HubTokenizer:
    """A `tokenizer.json`, for folders that carry no SentencePiece model."""

    def __init__(self, file: Path, settings: dict[str, Any]) -> None:
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: not a tokenizer: {error}") from error
        self._model.encode_special_tokens = True
        self.vocab_size: int = self._model.get_vocab_size()
        self.chat_template: str | None = settings.get("chat_template")
        self.bos = self._named(file, settings.get("bos_token") or "<s>")
        self.eos = self._named(file, settings.get("eos_token") or "</s>")
        added = self._model.get_added_tokens_decoder().items()
        self.control = {token.content: index for index, token in added if token.special}
        self.control |= {self.piece(index): index for index in (self.bos, self.eos)}

    def _named(self, file: Path, token: str | dict[str, Any]) -> int:
        content = token["content"] if isinstance(token, dict) else token
        index = self._model.token_to_id(content)
        if index is None:
            raise InputError(f"{file}: {content!r} isn't in its vocabulary")
        return index

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def piece(self, index: int) -> str:
        return self._model.id_to_token(index) or ""


@functools.cache
def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of the folder, or nothing; its chat template may lie in a file of its own."""
    file, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    try:
        found = json.loads(file.read_text()) if file.is_file() else {}
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: {error}") from error
    if template.is_file():
        found["chat_template"] = template.read_text()
    if isinstance(named := found.get("chat_template"), list):  # several for several purposes
        found["chat_template"] = next((t["template"] for t in named if t.get("name") == "default"), None)
    return found
