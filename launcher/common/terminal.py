"""Terminal output: colour, tables and progress.

rich leaves colour out when NO_COLOR is set or the output isn't a terminal. Nothing that came from users is read as
markup. Everything that is printed passes here, and loses the characters that would steer the terminal.
"""

import contextlib
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from launcher.common import printable

ENOUGH = 20  # characters of a note that tell something
BAD = ("FAILED", "TIMEOUT", "PREEMPTED", "BOOT_FAIL", "NODE_FAIL", "OUT_OF_MEMORY")
STYLES = {"COMPLETED": "green", "RUNNING": "cyan", "PENDING": "yellow", "CANCELLED": "magenta"}
STYLES |= dict.fromkeys(BAD, "red")  # of the states that Slurm knows


class _Clean(Console):
    """rich's console, whose texts are cleaned after they are laid out and before they are coloured."""

    def _render_buffer(self, buffer: Iterable[Segment]) -> str:
        return super()._render_buffer(
            part if part.control else part._replace(text=printable.clean(part.text)) for part in buffer
        )


@functools.cache
def console() -> Console:
    """The terminal. A pipe gets whole lines, never wrapped ones."""
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    terminal = _Clean(**plain)
    return terminal if terminal.is_terminal else _Clean(**plain, width=10_000)


def say(text: str, style: str = "") -> None:
    """One line on stdout."""
    console().print(text, style=style or None, soft_wrap=True)


def done(text: str) -> None:
    """Something that went well."""
    _marked("✓", "green", text)


def failed(text: str) -> None:
    """Something that didn't."""
    _marked("✗", "red", text)


def _marked(mark: str, style: str, text: str) -> None:
    mark = mark if console().encoding.lower().startswith("utf") else "*"
    console().print(Text.assemble((mark, f"bold {style}"), " ", text), soft_wrap=True)


def heading(text: str) -> None:
    """A title over what follows."""
    console().print(f"\n{text}", style="bold cyan", soft_wrap=True)


def facts(pairs: Iterable[tuple[str, str]]) -> None:
    """Names and values in two columns; names are dim, values whole."""
    kept = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in kept), default=0)
    for name, value in kept:
        line = Text(f"  {name:<{width}}  ", style="dim")
        line.append(value, style="not dim")
        console().print(line, soft_wrap=True)


def heading_with_state(text: str, state: str) -> None:
    """A title with the state of what follows, in the state's colour."""
    console().print()
    console().print(Text.assemble((text, "bold"), "  ", (state, STYLES.get(state, ""))), soft_wrap=True)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table without lines: people read it, and so do `cut` and `awk`."""
    console().print(grid(columns, rows))


def grid(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[str] = (), spare: Sequence[str] = ()
) -> Table:
    """A table, not printed yet. Columns that hold nothing are left out, and those of `spare` where it's narrow."""
    widths = _widths(columns, rows, spare)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for place, width in widths.items():
        justify: Any = "right" if columns[place] in right else "left"
        last = place == len(columns) - 1 and len(widths) > 1  # gives way when there's still too little room
        grid.add_column(columns[place], justify=justify, no_wrap=not last, min_width=None if last else width)
    for row in rows:
        cells = []
        for place in widths:
            style = STYLES.get(row[place].split(" ")[0], "dim" if place == len(columns) - 1 else "")
            cells.append(Text(printable.line(row[place]), style=style, no_wrap=True, overflow="ellipsis"))
        grid.add_row(*cells)
    return grid


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str]) -> dict[int, int]:
    """The columns to show, by place, and how wide each is."""
    widths = {
        place: max(len(column), *(len(row[place]) for row in rows))
        for place, column in enumerate(columns)
        if any(row[place] for row in rows)
    }
    for column in spare:
        last = max(0, widths.get(len(columns) - 1, 0) - ENOUGH)  # of the last column the beginning will do
        if sum(widths.values()) + 2 * len(widths) - last <= console().width:
            break
        widths.pop(columns.index(column), None)
    return widths


def as_json(value: Any) -> None:
    """What programs read: JSON, indented, in full."""
    printable.out(printable.as_json(value, indent=2))


def code(text: str, language: str) -> None:
    """A script or a configuration, coloured on a terminal and exactly itself elsewhere."""
    if not console().is_terminal:
        printable.out(text, end="" if text.endswith("\n") else "\n")
        return
    from rich.syntax import Syntax  # with pygments, which takes as long as all the rest

    console().print(Syntax(text, language, theme="ansi_dark", background_color="default", word_wrap=True))


@contextlib.contextmanager
def progress(title: str) -> "Iterator[Moving | Lines]":
    """A line that moves on a terminal, and elsewhere lines that come now and then."""
    if not console().is_terminal:
        yield Lines(title)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", style="bold", markup=False), BarColumn(24))
    with Progress(
        *columns,
        TextColumn("{task.fields[text]}", markup=False),
        TimeElapsedColumn(),
        console=console(),
        transient=True,
    ) as bar:
        yield Moving(bar, bar.add_task(title, total=None, text="starting"))


class Moving:
    """Progress on a terminal."""

    def __init__(self, bar: Any, task: Any) -> None:
        self._bar, self._task, self._text = bar, task, ""

    def update(self, text: str, done: float, total: float) -> None:
        """Where it stands now."""
        self._text = text
        self._bar.update(self._task, text=text, completed=done, total=total)

    def above(self, text: str) -> None:
        """A line that stays."""
        self._bar.console.print(f"  {text}", soft_wrap=True)

    def tick(self) -> None:
        """Time passes; the bar redraws by itself."""

    def end(self) -> None:
        """The bar is gone; where it stood stays."""
        if self._text:
            say(f"  {self._text}")


class Lines:
    """Progress in a log: the newest state, at most every few seconds, and always the last."""

    EVERY = 10.0

    def __init__(self, title: str) -> None:
        self._title, self._said, self._waiting = title, time.monotonic() - self.EVERY, ""

    def update(self, text: str, done: float, total: float) -> None:
        """Where it stands now."""
        self._waiting = text
        self.tick(last=done >= total)

    def above(self, text: str) -> None:
        """A line that is always said."""
        say(f"{self._title}: {text}")

    def tick(self, last: bool = False) -> None:
        """Say what waits when it's time."""
        if self._waiting and (last or time.monotonic() - self._said > self.EVERY):
            say(f"{self._title}: {self._waiting}")
            self._said, self._waiting = time.monotonic(), ""

    def end(self) -> None:
        """Say what still waits."""
        self.tick(last=True)
