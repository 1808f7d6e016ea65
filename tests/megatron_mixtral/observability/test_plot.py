"""The picture of a run: drawn from events alone, by the job at its end and by a command at any time."""

import json
import subprocess
import sys
import time

import pytest

from megatron_mixtral.errors import InputError
from megatron_mixtral.observability import plot


def write_run(folder, steps=60, restart=30):
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    events = [{"event": "start", "step": 0}]
    for step in [*range(1, restart + 5), *range(restart + 1, steps + 1)]:
        if step == restart + 1 and len(events) > step:
            events.append({"event": "start", "step": restart})
        loss = 4 * 0.97**step + (0.1 if step % 3 else 0) if step != 7 else "nan"
        load = {"expert_load": 1.2 + 1 / step, "expert_load_worst": 1.5 + 2 / step}
        events.append({"event": "step", "step": step, "loss": loss, **load})
        if step % 20 == 0:
            events.append({"event": "eval", "step": step, "loss": 4 * 0.97**step + 0.2})
    lines = [json.dumps({"time": time.time(), **event}) + "\n" for event in events]
    (folder / "events.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "finetune-1")


def test_a_run_is_drawn_by_a_process_of_its_own(run_dir, tmp_path):
    argv = [sys.executable, "-m", "megatron_mixtral.observability.plot", str(run_dir)]
    drawn = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert drawn.stdout.strip() == str(run_dir / "plot.png")
    assert (run_dir / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    target = tmp_path / "picture.svg"
    subprocess.run([*argv, str(target)], check=True, capture_output=True)
    assert "finetune-1" in target.read_text() or "<svg" in target.read_text()


def test_steps_done_twice_count_once_and_nan_not_at_all(run_dir):
    told = plot.events.read(run_dir / "events.jsonl")
    steps = plot.events.last_of_each_step(told, "step")
    assert [e["step"] for e in steps] == list(range(1, 61))
    x, y = plot._series(steps, "loss")
    assert 7 not in x
    assert len(y) == 59
    assert plot.smooth([1.0, 1.0, 1.0]) == [1.0, 1.0, 1.0]


def test_nothing_to_draw_is_said_and_ends_no_job(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="no step is done yet"):
        plot.draw(tmp_path / "run", tmp_path / "x.png")
    assert plot.at_the_end(tmp_path / "run").startswith("no plot: ")
    assert not (tmp_path / "x.png").exists()
