"""One option of a job: a field of its configuration says name, default, range, choices, help and what it goes with.

The command line, the checks of both packages and docs/options.md are made of these fields.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from string import Formatter
from typing import Any, get_args, get_origin

from megatron_mixtral.errors import InputError, LayoutError

LARGEST = 2**63  # what no counter of a job holds
LARGEST_SEED = 2**31 - 1
KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list"}


class SpecError(InputError):
    """What the contract refuses. `{field}` in `words` is an option, which each side names as its users write it."""

    def __init__(self, words: str, *values: object) -> None:
        super().__init__(words, *values)
        self.words, self.values = words, values

    def said(self, name_of: Callable[[str], str]) -> str:
        """The message, with every field named by `name_of`."""
        return Formatter().vformat(self.words, self.values, _Names(name_of))

    def __str__(self) -> str:
        return self.said(str)


class LayoutSpecError(SpecError, LayoutError):
    """A layout that can't exist with this model, this batch or on these ranks."""


class _Names(dict[str, str]):
    def __init__(self, name_of: Callable[[str], str]) -> None:
        self._name_of = name_of

    def __missing__(self, field: str) -> str:
        return self._name_of(field)


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key of a job's configuration. `default` is what the job does when the key is absent."""

    name: str
    kinds: tuple[type, ...]  # of its value; the first is how text is read
    help: str
    default: Any = None
    optional: bool = False  # may be None
    least: float = 0
    most: float = math.inf
    choices: tuple[str, ...] = ()
    needs: tuple[str, str] | None = None  # another option that must be set, and the words where it isn't
    typed: str = ""  # where the command line has another name for it
    own: bool = True  # the command line's option is made of this field; if not, a command has one of its own

    @property
    def kind(self) -> type:
        """What text is read as."""
        return self.kinds[0]

    @property
    def flag(self) -> str:
        """As typed: `--micro-batch`."""
        return self.typed or "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether a configuration without it is none."""
        return self.default is MISSING

    @property
    def numbers(self) -> bool:
        """Whether it takes a number."""
        return self.kind in (int, float)

    @property
    def span(self) -> str:
        """The numbers that are valid, in words; empty where there are none to tell."""
        if not self.numbers:
            return ""
        return f"at least {self.least}" if self.most == math.inf else f"between {self.least} and {self.most}"

    def checked(self, value: Any) -> Any:
        """`value` in this option's type; `SpecError` says what is valid. Text is read as the number it shows."""
        if value is None and self.optional:
            return None
        if self.numbers:
            return self._number(value)
        if not isinstance(value, self.kinds):
            raise self._refused("{!r} isn't {}", value, " or ".join(KINDS[kind] for kind in self.kinds))
        if self.choices and value not in self.choices:
            raise self._refused("{!r} isn't one of {}", value, ", ".join(self.choices))
        return value

    def _number(self, value: Any) -> int | float:
        try:
            number: int | float = int(value) if self.kind is int else float(value)
            other = isinstance(value, bool) or (isinstance(value, float) and number != value)
            if other or not math.isfinite(number) or (self.kind is int and abs(number) >= LARGEST):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            raise self._refused("{!r} isn't {}", value, KINDS[self.kind]) from None
        if not self.least <= number <= self.most:
            raise self._refused("{} must be {}", number, self.span)
        return number

    def _refused(self, words: str, *values: object) -> SpecError:
        return SpecError(f"{{{self.name}}}: {words}", *values)


def option(default: Any, *, help: str, **more: Any) -> Any:
    """A field that the command line has an option for; `more` is the rest of `Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


def planned(help: str, typed: str = "", default: Any = MISSING, **more: Any) -> Any:
    """A field that a plan fills in, from an argument or option `typed` that the command makes by itself."""
    kept = {"help": help, "typed": typed, "own": False, **more}
    if default.__class__ is type:
        return dataclasses.field(default_factory=default, metadata=kept)
    return dataclasses.field(default=default, metadata=kept)


def options(job: type) -> dict[str, Option]:
    """Every field of a job's configuration, or of a layout, by its name."""
    return {f.name: _option(f) for f in dataclasses.fields(job)}


def own(job: type) -> list[Option]:
    """Those that the command line has an option for."""
    return [found for found in options(job).values() if found.own]


def _option(field: "dataclasses.Field[Any]") -> Option:
    kinds = get_args(field.type) if get_origin(field.type) is not list else (field.type,)
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    return Option(
        name=field.name,
        kinds=tuple(get_origin(kind) or kind for kind in kinds or (field.type,) if kind is not type(None)),
        optional=type(None) in kinds,
        default=default,
        **field.metadata,
    )
