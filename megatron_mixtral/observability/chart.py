"""A run's loss as a chart of characters: what the log ends with and the demonstration shows.

Each column is the mean of the steps that fall into it, so that noise averages out and the trend stands.
"""

import itertools
from collections.abc import Sequence
from pathlib import Path

from megatron_mixtral.observability import events

MARKS = " ▁▂▃▄▅▆▇█"


def draw(points: Sequence[tuple[float, float]], *, title: str, width: int = 64, height: int = 12) -> str:
    """`points` (x, y) in order of x, as a block chart with its axes; one line when there is nothing to draw."""
    if len(points) < 2:
        return f"{title}: {len(points)} points, nothing to draw"
    columns = _columns([y for _, y in points], min(width, len(points)))
    low, high = min(columns), max(columns)
    span = (high - low) or 1.0
    levels = [1 + (value - low) / span * (height * 8 - 1) for value in columns]
    lines = [title]
    for row in reversed(range(height)):
        label = {height - 1: f"{high:8.3f}", 0: f"{low:8.3f}"}.get(row, " " * 8)
        lines.append(f"{label} ┤" + "".join(MARKS[int(min(max(v - row * 8, 0), 8))] for v in levels))
    first, last = f"{points[0][0]:g}", f"step {points[-1][0]:g}"
    lines.append(" " * 9 + "└" + "─" * len(columns))
    lines.append(" " * 10 + first + last.rjust(max(len(columns) - len(first), len(last) + 1)))
    return "\n".join(lines)


def loss(run_dir: Path) -> str:
    """The training loss of the run in `run_dir`; steps done twice after a restart count once, the later time."""
    steps = events.last_of_each_step(events.read(run_dir / "events.jsonl"), "step")
    return draw([(e["step"], e["loss"]) for e in steps if isinstance(e.get("loss"), float)], title="training loss")


def _columns(values: list[float], count: int) -> list[float]:
    """Mean of each of `count` equal stretches."""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
