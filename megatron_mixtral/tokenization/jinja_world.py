"""The Jinja that chat templates are written in, as transformers sets it up: its sandbox, filters and functions.

`{% generation %}` encloses what the assistant says; here its ends are marked in the text by characters no text has.
"""

import functools
import json
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

BEGIN, END = "\ufdd1", "\ufdd2"  # around an answer


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: what stands in it is the assistant's."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [jinja2.nodes.Output([jinja2.nodes.TemplateData(mark)], lineno=line) for mark in (BEGIN, END)]
        return [marks[0], *body, marks[1]]


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own escapes for HTML; the order of the options is transformers'."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.cache
def _world() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    world = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    world.filters["tojson"] = _tojson
    world.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return world


@functools.cache
def compiled(source: str) -> jinja2.Template:
    """`jinja2.TemplateError` for what can't be compiled."""
    return _world().from_string(source)


@functools.cache
def literals(source: str) -> str:
    """What `source` itself writes, its pieces apart by a character that no token has; nothing if it is no Jinja."""
    try:
        tree = _world().parse(source)
    except jinja2.TemplateError:
        return ""
    found = [node.data for node in tree.find_all(jinja2.nodes.TemplateData)]
    found += [node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)]
    return "\0".join(found)
