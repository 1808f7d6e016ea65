"""Merges a profile's YAML: parents, the file, and overrides on top. Variables are expanded, and every key's origin
is kept.

It doesn't know which keys are valid. `profile` validates the result, and asks for the place of a mistake.
"""

import functools
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from launcher.cluster import catalog
from launcher.common import quoting, state_dir
from launcher.errors import ProfileError, UsageError

Location = tuple[str | int, ...]
REFERENCE = re.compile(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)\}|(?P<plain>[A-Za-z_]\w*))")
PARENT = "extends"
OWN = ("name",)  # what a profile doesn't inherit
NO_VALUE = (ValueError, LookupError, AttributeError, ArithmeticError)  # by PyYAML, for `!!int x` and such
MOST_KEYS = 10_000  # a profile has some dozens; nested aliases can make billions
DEEPEST = 100  # sections in sections
STRUCTURED = ("[", "{", '"', "'")  # how an override's value begins that isn't plain text


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a key was written: for people, and the folder that its relative paths start from."""

    text: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Document:
    """Keys and values, and where each of them was written."""

    values: dict[str, Any]
    origins: dict[Location, Origin]
    source: Origin  # of mistakes that are about no key in particular

    def origin(self, location: Location) -> Origin:
        """Where the key at `location` was written, or the nearest section around it."""
        known = (self.origins.get(location[:length]) for length in range(len(location), 0, -1))
        return next(filter(None, known), self.source)

    def error(self, location: Location, message: str) -> ProfileError:
        """A mistake, with where it is."""
        return ProfileError(f"{self.origin(location).text}: {message}")


class PlainLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # the C one where there is one
    """SafeLoader without YAML 1.1's surprises: everything is text except true, false, null and plain whole numbers.

    `12:00:00`, `no`, `08`, `1.50` and `2026-01-01` stay what was typed.
    """


PlainLoader.yaml_implicit_resolvers = {}
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), list("tf"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|)$"), ["~", "n", ""])
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])


def read(path: Path, overrides: Sequence[str] = ()) -> Document:
    """The profile in `path` over its parents, with `-o KEY=VALUE` over all; `ProfileError` names line and key."""
    layers = [*_lineage(path, ()), *map(_override, overrides)]
    merged = replace(functools.reduce(_over, layers), source=layers[-1 - len(overrides)].source)
    return replace(merged, values=_expanded(merged, merged.values))


def _lineage(path: Path, children: tuple[Path, ...]) -> list[Document]:
    """The document in `path` and all that it extends, the most distant parent first."""
    document = _parsed(path)
    if PARENT not in document.values:
        return [document]
    reference = document.values.pop(PARENT)
    if not isinstance(reference, str) or not reference:
        raise document.error((PARENT,), f"extends: give the name or the path of one profile (got {reference!r})")
    chain = (*children, path.resolve())
    reference = _expanded(document, reference, (PARENT,))
    try:
        parent = catalog.parent(reference, path)
    except (ProfileError, OSError) as error:
        raise document.error((PARENT,), f"extends: {error}") from None
    if parent.resolve() in chain:
        circle = " -> ".join(p.name for p in (*chain[chain.index(parent.resolve()) :], parent))
        raise document.error((PARENT,), f"extends: a circle, {circle}")
    above = _lineage(parent, chain)
    for name in OWN:
        above[-1].values.pop(name, None)
    return [*above, document]


def _over(below: Document, above: Document) -> Document:
    return replace(above, values=_merged(below.values, above.values), origins={**below.origins, **above.origins})


def _merged(below: Any, above: Any) -> Any:
    """Sections key by key; lists and scalars replace, and null takes away what is below it."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    merged = dict(below)
    for key, value in above.items():
        if value is None and key in below:
            del merged[key]
        else:
            merged[key] = _merged(below.get(key), value)
    return merged


def _parsed(path: Path) -> Document:
    """One file, as it stands."""
    shown = f"cluster profile {path}"
    origins: dict[Location, Origin] = {}
    source = Origin(text=shown, folder=path.parent.absolute())
    try:
        loader, node = _composed(path.read_text())
        if not isinstance(node, yaml.MappingNode):
            raise ProfileError(f"{shown}: expected keys and values, such as `scheduler: slurm`")
        values = _built(loader, node, (), origins, source)
    except RecursionError as error:
        raise ProfileError(f"{shown}: a value contains itself") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ProfileError(f"{shown}: {error}") from error
    return Document(values=values, origins=origins, source=source)


def _composed(text: str) -> tuple[Any, Any]:
    """A loader, and the root node of `text`. libyaml recurses without a limit and would crash on deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=PlainLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"nested more than {DEEPEST} deep")
    loader = PlainLoader(text)
    return loader, loader.get_single_node()


def _built(loader: Any, node: Any, location: Location, origins: dict[Location, Origin], source: Origin) -> Any:
    """The value of `node`; `origins` gets the line of every key in it."""
    if len(origins) > MOST_KEYS:
        raise ProfileError(f"{source.text}: more than {MOST_KEYS} keys and values")
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            origins[(*location, index)] = _at(source, item)
        return [_built(loader, item, (*location, i), origins, source) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        try:
            return loader.construct_object(node)
        except NO_VALUE:
            kind = node.tag.rpartition(":")[2]
            raise ProfileError(f"{_at(source, node).text}: {quoting.shown(node.value)} isn't {kind}") from None
    merges = any(key.tag.endswith(":merge") for key, _ in node.value)
    if merges:
        loader.flatten_mapping(node)
    values: dict[str, Any] = {}
    for key, value in node.value:
        here = (*location, key.value)
        if not isinstance(key, yaml.ScalarNode):
            raise ProfileError(f"{_at(source, key).text}: a key must be a word")
        if key.value in values and not merges:
            raise ProfileError(f"{_at(source, key).text}: {'.'.join(map(str, here))} is there twice")
        origins[here] = _at(source, key)
        values[key.value] = _built(loader, value, here, origins, source)
    return values


def _at(source: Origin, node: Any) -> Origin:
    return replace(source, text=f"{source.text}:{node.start_mark.line + 1}")


def _override(text: str) -> Document:
    """`node.gpus=4` as a document of one key. Its value is read as a profile's, but plain text needs no quotes."""
    key, equals, typed = text.partition("=")
    location = tuple(key.strip().split("."))
    source = Origin(text=f"-o {quoting.shown(text)}", folder=Path.cwd())
    if not equals or not all(location):
        raise UsageError(f"{source.text}: write KEY=VALUE, such as -o node.gpus=4")
    if location[0] == PARENT:
        raise UsageError(f"{source.text}: only a file can extend another")
    value: Any = _typed(typed, source)
    for part in reversed(location):
        value = {part: value}
    origins: dict[Location, Origin] = {location[: n + 1]: source for n in range(len(location))}
    return Document(values=value, origins=origins, source=source)


def _typed(text: str, source: Origin) -> Any:
    """Numbers, true, false, null, and what begins as a list, a mapping or a quotation; all else is text."""
    try:
        if text.startswith(STRUCTURED):
            return _built(*_composed(quoting.short(text, source.text)), (), {}, source)
        plain = yaml.ScalarNode("", text)
        loader = PlainLoader("")
        plain.tag = loader.resolve(yaml.ScalarNode, text, (True, False))
        return loader.construct_object(plain)
    except RecursionError:
        raise UsageError(f"{source.text}: a value contains itself") from None
    except (yaml.YAMLError, *NO_VALUE) as error:
        raise UsageError(f"{source.text}: {error}") from None


def _expanded(document: Document, value: Any, location: Location = ()) -> Any:
    """Every string with its $VARIABLES replaced, so `clusters show` prints exactly what the script gets."""
    if isinstance(value, dict):
        return {k: _expanded(document, v, (*location, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_expanded(document, v, (*location, i)) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    field = ".".join(map(str, location))
    try:
        return quoting.checked(REFERENCE.sub(_lookup, value), field)
    except KeyError as error:
        raise document.error(location, f"{field}: ${error.args[0]} isn't set in the environment") from None
    except UsageError as error:
        raise document.error(location, str(error)) from None


def _lookup(match: re.Match[str]) -> str:
    name = match["braced"] or match["plain"]
    return os.environ.get(name) or _defaults()[name]


def _defaults() -> dict[str, str]:
    """Variables that the built-in profiles use and that have a value unless the environment gives another."""
    state = state_dir.state()
    return {
        "MIXLAUNCH_PYTHON": sys.executable,
        "MIXLAUNCH_STATE": str(state),
        "MIXLAUNCH_SANDBOX": str(state / "sandbox"),
    }
