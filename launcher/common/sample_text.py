"""English text that every Python brings: the docstrings of its standard library, one module a document.

The demo and the rehearsal train on it.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

KINDS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings() -> Iterator[str]:
    """The docstrings of the standard library, module by module."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        nodes = ast.walk(ast.parse(path.read_bytes()))
        found = [ast.get_docstring(node) for node in nodes if isinstance(node, KINDS)]
        if text := "\n\n".join(filter(None, found)):
            yield text


def write(path: Path, size: int) -> None:
    """Docstrings as JSONL, one module a document, until the file has `size` characters."""
    with path.open("w") as stream:
        for text in docstrings():
            size -= stream.write(json.dumps({"text": text}) + "\n")
            if size < 0:
                return
