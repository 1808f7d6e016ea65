"""Renders a job's script from its parts: those that come with mixlaunch, or the user's own in their place.

A user's template runs in Jinja's sandbox, and an error in it names its file and line.
"""

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox

from launcher import templates
from launcher.common import quoting
from launcher.common.quoting import Quoted
from launcher.errors import UsageError
from launcher.templates import FOLDER, SUFFIX

BASE = "job"
STOCK = "stock"  # `{% include "stock/rank.sh.j2" %}` is ours, even if the profile replaces it
CONFIG_END = "END_OF_CONFIG"


def render(replaced: Mapping[str, str], variables: Mapping[str, Any]) -> str:
    """The script, with `replaced`, part -> path, in place of our own; `UsageError` for what is wrong in those."""
    own = {f"{templates.known(name)}{SUFFIX}": _read(name, path) for name, path in replaced.items()}
    paths = [str(Path(path)) for path in replaced.values()]
    try:
        jinja = environment(_Own(own, dict(zip(own, paths, strict=True))))
        return jinja.get_template(BASE + SUFFIX).render(variables)
    except jinja2.TemplateSyntaxError as error:
        if error.filename in paths:
            raise UsageError(f"template {error.filename}:{error.lineno}: {error.message}") from error
        raise
    except Exception as error:
        if place := _place(error, paths):
            raise UsageError(f"template {place}: {str(error).removeprefix('template: ')}") from error
        raise


def _read(name: str, path: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, ValueError) as error:
        raise UsageError(f"templates.{name}: {path}: {getattr(error, 'strerror', None) or error}") from error


def _place(error: Exception, paths: list[str]) -> str:
    """FILE:LINE of the user's template that was being rendered."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in paths:
            return f"{frame.filename}:{frame.lineno}"
    return ""


class _Own(jinja2.BaseLoader):
    """Texts of the user's own; a path beside each, so that errors can name it."""

    def __init__(self, texts: Mapping[str, str], paths: Mapping[str, str]) -> None:
        self.texts = texts
        self.paths = paths

    def get_source(
        self, environment: jinja2.Environment, template: str
    ) -> tuple[str, str | None, Callable[[], bool] | None]:
        template = _current(template)
        if template not in self.texts:
            raise jinja2.TemplateNotFound(template)
        return self.texts[template], self.paths[template], None


class _Stock(jinja2.FileSystemLoader):
    """The texts that come with mixlaunch."""

    def get_source(self, environment: jinja2.Environment, template: str) -> tuple[str, str, Callable[[], bool]]:
        return super().get_source(environment, _current(template))


def _current(file: str) -> str:
    """What the file of a part is called now."""
    name = file.removesuffix(SUFFIX)
    return f"{templates.FORMER.get(name, name)}{SUFFIX}"


def environment(own: jinja2.BaseLoader | None = None) -> jinja2.Environment:
    """Jinja as scripts are rendered with it: only literals, whole numbers and quoted values can be printed."""
    ours = _Stock(FOLDER)
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.ChoiceLoader([*filter(None, [own]), ours, jinja2.PrefixLoader({STOCK: ours})]),
        undefined=jinja2.StrictUndefined,
        finalize=_only_quoted,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        "sh": quoting.sh,
        "directive": quoting.directive,
        "name": lambda value: Quoted(quoting.name(value, "name")),
        "variable": lambda value: Quoted(quoting.variable(value, "variable")),
        "heredoc": lambda text: quoting.heredoc(text, CONFIG_END),
    }
    return made


def _only_quoted(value: Any) -> Any:
    """What a template may print: a value that went through a filter, or a number."""
    if isinstance(value, jinja2.Undefined):
        str(value)  # says which name isn't defined
    if isinstance(value, Quoted) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise UsageError(f"template: {value!r} is printed without a quoting filter; write {{{{ value | sh }}}}")
