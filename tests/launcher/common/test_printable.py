"""What is printed can't steer a terminal, whoever wrote it."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

import launcher
from launcher.common import printable, terminal

EVIL = [
    "\x1b]52;c;ZXZpbA==\x07",
    "\x1b[2J",
    "\x9b31m",
    "\x7f",
    "\r",
    "\x00",
    "\u202e",
    "\u2066",
    "\u200f",
    "\u2028",
    "\ud800",
]


@pytest.mark.parametrize("evil", EVIL)
def test_no_such_character_is_left(evil):
    assert not printable._STEERING.search(printable.clean(f"a{evil}b"))
    text = printable.as_json({evil: evil})
    assert json.loads(text) == {evil: evil}
    assert not printable._STEERING.search(text)


def test_everything_else_stays():
    text = "tab\tline\nüñí 漢字 🙂 é"
    assert printable.clean(text) == text
    assert printable.clean("a\r\n\x1b[1;31mred\x1b[0m") == "a\nred"
    assert printable.line("one\ntwo") == "one?two"


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("coloured", [True, False])
def test_the_terminal_is_clean_whatever_prints(evil, coloured, monkeypatch):
    stream = io.StringIO()
    made = terminal._Clean(file=stream, force_terminal=coloured, color_system=None, highlight=False, markup=False)
    monkeypatch.setattr(terminal, "console", lambda: made)
    terminal.say(f"x{evil}")
    terminal.done(f"x{evil}")
    terminal.failed(f"x{evil}")
    terminal.heading(f"x{evil}")
    terminal.heading_with_state(f"x{evil}", evil)
    terminal.facts([(f"x{evil}", evil)])
    terminal.table(("A", "B"), [(f"x{evil}", evil)])
    with terminal.progress(f"x{evil}") as line:
        line.update(evil, 1, 2)
        line.above(evil)
    own = ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A", "\r")  # rich's own, for the moving line
    text = stream.getvalue()
    for word in own if coloured else ():
        text = text.replace(word, "")
    assert not printable._STEERING.search(text), text


def test_the_console_is_richs_own_otherwise():
    assert issubclass(terminal._Clean, Console)


def test_nothing_else_prints():
    """Every text passes the one place; a program's own output in the foreground is its own."""
    found = []
    for path in Path(launcher.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name in ("print", "click.echo", "click.secho", "sys.stdout.write", "sys.stderr.write"):
                found.append((path.name, name, ast.unparse(node)))
    allowed = {
        ("printable.py", "print"),
        ("main.py", "click.echo"),  # an error's label is coloured, its text cleaned
        ("completion.py", "click.echo"),  # the script that a shell evaluates
    }
    assert {(file, name) for file, name, _ in found} <= allowed, found
