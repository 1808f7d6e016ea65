"""What the files beside a vocabulary say of a tokenizer: special and added tokens, chat templates, end tokens.

They are read as transformers reads them; where two of them contradict each other its choice is taken, and noted.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# Model types whose folders transformers reads by its general class, whatever class they name.
GENERAL = ("mixtral", "mistral", "mistral3")
FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "config.json",
    "chat_template.jinja",
    "tokenizer.model",
)
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names of chat templates, where there are several


@dataclass(frozen=True, kw_only=True)
class Added:
    """A token that is looked for in text before the vocabulary is; the flags are `tokenizers.AddedToken`'s."""

    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All of it, for one folder."""

    named: dict[str, str | Added] = field(default_factory=dict)  # bos_token and its like
    added: dict[int, Added] = field(default_factory=dict)  # by the id that the files give it
    extra: tuple[str | Added, ...] = ()
    extra_known: bool = False  # whether tokenizer_config.json says which these are, be it none
    templates: dict[str, str] = field(default_factory=dict)
    ends: tuple[int, ...] = ()  # where transformers' `generate` stops
    ends_file: str = "config.json"  # the file that says so
    llama: dict[str, Any] | None = None  # how LlamaTokenizer is to put a space first, where that class is taken
    split_special: bool = False
    notes: tuple[str, ...] = ()


def read(folder: Path, *, hub_file: Path | None) -> Settings:
    """The settings in `folder`; `hub_file` is the `tokenizer.json` that is read, if one is."""
    config = _json(folder / "tokenizer_config.json")
    model = _json(folder / "config.json")
    notes: list[str] = []
    named, added, extra = _tokens(folder, config, hub_file, notes)
    kinds = ("extra_special_tokens", "additional_special_tokens")
    ends, ends_file = _ends(folder, model)
    return Settings(
        named=named,
        added=added,
        extra=extra,
        extra_known=any(kind in config for kind in kinds),
        templates=_templates(folder, config, notes),
        ends=ends,
        ends_file=ends_file,
        llama=_llama(config, model),
        split_special=bool(config.get("split_special_tokens")),
        notes=tuple(notes),
    )


def stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Changes when any file does that is read here."""
    paths = [folder / name for name in FILES] + sorted((folder / "additional_chat_templates").glob("*.jinja"))
    found = [(path, path.stat()) for path in paths if path.is_file()]
    return tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in found)


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise InputError(f"{file}: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{file}: a {type(found).__name__}, where an object is expected")
    return found


def _tokens(
    folder: Path, config: dict[str, Any], hub_file: Path | None, notes: list[str]
) -> tuple[dict[str, str | Added], dict[int, Added], tuple[str | Added, ...]]:
    """Named, added and extra special tokens. With `added_tokens_decoder` the older two files aren't looked at."""
    file = folder / "tokenizer_config.json"
    older = _json(folder / "special_tokens_map.json")
    named = {key: _token(value, file, key) for key, value in config.items() if _names_a_token(key, value)}
    extra = _extra(config, named, file)
    if "added_tokens_decoder" in config:
        listed = config["added_tokens_decoder"]
        found = {_id(key, file): _token(value, file, "added_tokens_decoder") for key, value in listed.items()}
        added = {index: token for index, token in found.items() if isinstance(token, Added)}
        _note_older(folder, older, named, added, notes)
        return _with_flags(named, added), added, extra
    file = folder / "special_tokens_map.json"
    over = {
        key: _token(value, file, key, special=True) for key, value in older.items() if _names_a_token(key, value)
    }
    _note_other(named, over, notes)
    named |= over
    plain = {value for key, value in config.items() if key in NAMED and isinstance(value, str) and key not in over}
    special = plain | {content(token) for token in (*over.values(), *extra)}
    if not (
        config.keys() & {"extra_special_tokens", "additional_special_tokens"}
        and "additional_special_tokens" in older
    ):
        extra = tuple(dict.fromkeys((*extra, *_extra(older, named, file))))
    added = _from_older(folder, special) | _from_hub_file(hub_file)
    return _with_flags(named, added), added, extra


def _names_a_token(key: str, value: Any) -> bool:
    return key.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value))


def _token(value: Any, file: Path, key: str, *, special: bool | None = None) -> str | Added:
    if isinstance(value, str):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise InputError(f"{file}: {key}: {json.dumps(value)[:60]} isn't a token")
    flags = {"normalized": not value.get("special", False), "special": False} | {
        name: bool(value[name]) for name in FLAGS if name in value
    }
    return Added(content=value["content"], **(flags if special is None else flags | {"special": special}))


def _id(text: str, file: Path) -> int:
    if not text.isdigit():
        raise InputError(f"{file}: added_tokens_decoder: {text!r} isn't a token's id")
    return int(text)


def _extra(config: dict[str, Any], named: dict[str, str | Added], file: Path) -> tuple[str | Added, ...]:
    """Special tokens without a role; those in a dictionary have a role that transformers doesn't know."""
    found = config.get("extra_special_tokens") or config.get("additional_special_tokens") or ()
    if isinstance(found, dict):
        named |= {key: _token(value, file, key) for key, value in found.items()}
        return ()
    return tuple(_token(value, file, "extra_special_tokens", special=True) for value in found)


def _from_older(folder: Path, special: set[str]) -> dict[int, Added]:
    file = folder / "added_tokens.json"
    found = _json(file)
    if bad := next((name for name, index in found.items() if not isinstance(index, int)), None):
        raise InputError(f"{file}: {bad!r}: {found[bad]!r} isn't a token's id")
    return {
        index: Added(content=name, normalized=name not in special, special=name in special)
        for name, index in found.items()
    }


def _from_hub_file(hub_file: Path | None) -> dict[int, Added]:
    listed = _json(hub_file).get("added_tokens", []) if hub_file else []
    return {
        token["id"]: Added(content=token["content"], **{name: bool(token.get(name)) for name in FLAGS})
        for token in listed
    }


def _with_flags(named: dict[str, str | Added], added: dict[int, Any]) -> dict[str, str | Added]:
    """Named tokens as they are listed among the added ones."""
    listed = {content(token): token for token in added.values()}
    return {key: listed.get(content(token), token) for key, token in named.items()}


def content(token: str | Added) -> str:
    return token if isinstance(token, str) else token.content


def _note_older(
    folder: Path, older: dict[str, Any], named: dict[str, str | Added], added: dict[int, Any], notes: list[str]
) -> None:
    """What the older files say otherwise than `tokenizer_config.json`, which transformers takes alone."""
    for key in NAMED:
        if key in older and _names_a_token(key, older[key]):
            theirs = content(_token(older[key], folder, key))
            ours = content(named[key]) if key in named else None
            if ours != theirs:
                notes.append(
                    f"special_tokens_map.json names {theirs} as {key}, tokenizer_config.json {ours}; "
                    "transformers takes the latter"
                )
    for name, index in _json(folder / "added_tokens.json").items():
        listed = added.get(index)
        if listed is None or content(listed) != name:
            notes.append(
                f"added_tokens.json has {name} as {index}, tokenizer_config.json "
                f"{'nothing' if listed is None else content(listed)}; transformers takes the latter"
            )


def _note_other(named: dict[str, str | Added], over: dict[str, str | Added], notes: list[str]) -> None:
    for key in NAMED:
        if key in named and key in over and content(named[key]) != content(over[key]):
            notes.append(
                f"tokenizer_config.json names {content(named[key])} as {key}, special_tokens_map.json "
                f"{content(over[key])}; transformers takes the latter"
            )


def _templates(folder: Path, config: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """Chat templates by name; files take precedence over all that is in tokenizer_config.json."""
    listed = config.get("chat_template")
    named = {DEFAULT: listed} if isinstance(listed, str) else {}
    if isinstance(listed, list):
        named = {
            t["name"]: t["template"] for t in listed if isinstance(t, dict) and "name" in t and "template" in t
        }
    files = dict(_template_files(folder))
    if files and named and files != named:
        notes.append("chat_template.jinja isn't tokenizer_config.json's chat_template; transformers takes the file")
    return files or named


def _template_files(folder: Path) -> Iterator[tuple[str, str]]:
    paths = [(DEFAULT, folder / "chat_template.jinja")]
    paths += [(path.stem, path) for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))]
    for name, path in paths:
        if path.is_file():
            try:
                yield name, path.read_text()
            except UnicodeDecodeError as error:
                raise InputError(f"{path}: {error}") from error


def _ends(folder: Path, model: dict[str, Any]) -> tuple[tuple[int, ...], str]:
    """The ids that end a text, and the file that says so: config.json's count only without the other."""
    file = folder / "generation_config.json"
    name, said = ("generation_config.json", _json(file)) if file.is_file() else ("config.json", model)
    value = said.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(index, int) or isinstance(index, bool) or index < 0 for index in ids):
        raise InputError(f"{folder / name}: eos_token_id: {value!r} isn't a token's id or a list of them")
    return tuple(dict.fromkeys(ids)), name


def _llama(config: dict[str, Any], model: dict[str, Any]) -> dict[str, Any] | None:
    """LlamaTokenizer's settings where transformers takes that class: its own way with spaces, not the file's."""
    if model.get("model_type") in GENERAL:
        return None
    if str(config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
        return None
    return {name: config.get(name) for name in ("legacy", "add_prefix_space")}
