"""Draws a run's loss and expert load as a picture, and its loss as a text chart, from its events.

`python -m megatron_mixtral.observability.plot RUN [FILE]`

It imports no torch, so it works wherever the run directory is. A picture needs matplotlib, which is optional.
"""

import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.observability import events
from megatron_mixtral.spec import rundir

NAME = "plot.png"
MARKS = " ▁▂▃▄▅▆▇█"
BLUE, ORANGE, GREY = "#1f5fa8", "#d9730d", "#b8c4d4"


def draw(run_dir: Path, target: Path) -> Path:
    """The picture at `target`; `InputError` for a run without steps, or if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure  # optional, and slow: training imports this module at its start
    except ImportError as error:
        raise InputError("matplotlib isn't installed: pip install matplotlib") from error
    told = events.read(run_dir / rundir.EVENTS)
    steps = events.last_of_each_step(told, "step")
    if not steps:
        raise InputError(f"{run_dir}: no step is done yet, so there is nothing to draw")
    figure = Figure(figsize=(9, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    _loss(above, steps, events.last_of_each_step(told, "eval"))
    _load(below, steps)
    for number, panel in enumerate((above, below)):
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        for order, begun in enumerate(_attempts(told)):
            label = None if number or order else "a new attempt began"
            panel.axvline(begun, color="#999999", linestyle=":", linewidth=1, label=label)
        panel.legend(frameon=False, loc="upper right")
    figure.suptitle(run_dir.resolve().name)
    below.set_xlabel("step")
    figure.savefig(target, dpi=120)
    return target


def _attempts(told: list[dict[str, Any]]) -> list[int]:
    """The steps at which later attempts began."""
    return [e["step"] for e in told if e["event"] == "start" and e.get("step")]


def _loss(panel: Any, steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    x, y = _series(steps, "loss")
    panel.plot(x, y, color=GREY, linewidth=1, label="training loss")
    panel.plot(x, smooth(y), color=BLUE, linewidth=2, label="recent mean")
    if evals:
        panel.plot(*_series(evals, "loss"), "o-", color=ORANGE, markersize=4, label="validation loss")
    panel.set_ylabel("loss, nats a token")


def _load(panel: Any, steps: list[dict[str, Any]]) -> None:
    """The busiest expert's tokens divided by the mean: over all layers, and in the worst layer."""
    panel.plot(*_series(steps, "expert_load_worst"), color=ORANGE, linewidth=1.5, label="worst layer")
    panel.plot(*_series(steps, "expert_load"), color=BLUE, linewidth=1.5, label="mean over layers")
    panel.axhline(1, color="#999999", linewidth=1)
    panel.set_ylabel("busiest expert / mean")


def _series(found: list[dict[str, Any]], field: str) -> tuple[list[int], list[float]]:
    """Steps and finite values; what isn't finite is text in events."""
    pairs = [(e["step"], e[field]) for e in found if isinstance(e.get(field), (int, float))]
    return [x for x, _ in pairs], [y for _, y in pairs]


def smooth(values: list[float]) -> list[float]:
    """An exponential moving average over about a thirtieth of the values."""
    keep = 1 - 1 / max(1.0, len(values) / 30)
    total = weight = 0.0
    means = []
    for value in values:
        total, weight = total * keep + value, weight * keep + 1
        means.append(total / weight)
    return means


def at_the_end(run_dir: Path) -> str:
    """Draw the picture at a job's end and return a line for the log; a failure doesn't fail the job."""
    try:
        return f"plot: {draw(run_dir, run_dir / NAME)}"
    except (InputError, OSError) as error:
        return f"no plot: {error}"


# The text chart: each column is the mean of its steps, so it shows the trend.


def chart(points: Sequence[tuple[float, float]], *, title: str, width: int = 64, height: int = 12) -> str:
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


def loss_chart(run_dir: Path) -> str:
    """The training loss of the run in `run_dir`; of a step that was repeated after a restart, the last event
    counts.
    """
    steps = events.last_of_each_step(events.read(run_dir / rundir.EVENTS), "step")
    return chart([(e["step"], e["loss"]) for e in steps if isinstance(e.get("loss"), float)], title="training loss")


def _columns(values: list[float], count: int) -> list[float]:
    """The means of `count` equal segments."""
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def main(argv: list[str]) -> int:
    if len(argv) not in (1, 2):
        print("usage: python -m megatron_mixtral.observability.plot RUN [FILE]", file=sys.stderr)
        return 2
    run_dir = Path(argv[0])
    try:
        print(draw(run_dir, Path(argv[1]) if len(argv) == 2 else run_dir / NAME))
    except (JobError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
