"""`events.jsonl` is always readable, and the chart shows the run as it went."""

import json

from megatron_mixtral.observability import events, plot
from megatron_mixtral.observability.events import EventLog


def test_every_line_is_strict_json_even_of_a_loss_that_is_not_a_number(tmp_path):
    EventLog(tmp_path / "e").write("step", loss=float("nan"), grad_norm=float("inf"), step=1)
    line = json.loads((tmp_path / "e").read_text(), parse_constant=lambda name: 1 / 0)
    assert (line["event"], line["loss"], line["grad_norm"]) == ("step", "nan", "inf")


def test_a_torn_last_line_is_left_out(tmp_path):
    log = EventLog(tmp_path / "e")
    log.write("one")
    with (tmp_path / "e").open("a") as stream:
        stream.write('{"time": 1, "ev')
    assert [e["event"] for e in events.read(tmp_path / "e")] == ["one"]
    assert events.read(tmp_path / "nothing") == []


def test_what_a_lost_node_leaves_in_it_ends_no_run(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    log.write("step", step=1, loss=3.0)
    with (tmp_path / "events.jsonl").open("ab") as stream:
        stream.write(b'\0\0\0\xff\xfe\n12\nnull\n[1]\n{}\n{"event": 3}\n{"event": "step"}\n{"event": "start"}\n')
    log.write("step", step=2, loss=2.0)
    assert [e["loss"] for e in events.last_of_each_step(events.read(tmp_path / "events.jsonl"), "step")] == [
        3.0,
        2.0,
    ]
    assert "2.000" in plot.loss_chart(tmp_path)
    assert plot.draw(tmp_path, tmp_path / "plot.png").stat().st_size > 0
    (tmp_path / "e").mkdir()
    assert events.read(tmp_path / "e") == []


def test_ranks_without_a_path_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    EventLog(None).write("step", step=1)
    assert not list(tmp_path.iterdir())


def test_the_chart_falls_where_the_loss_falls():
    lines = plot.chart([(n, 10 - n) for n in range(10)], title="loss", width=10, height=5).splitlines()
    heights = [sum(line[10 + column] != " " for line in lines[1:6]) for column in range(10)]
    assert lines[0] == "loss"
    assert lines[1].startswith("  10.000 ┤█")
    assert lines[5].startswith("   1.000 ┤")
    assert heights == sorted(heights, reverse=True)
    assert (heights[0], heights[-1]) == (5, 1)
    assert lines[-1].split() == ["0", "step", "9"]


def test_more_points_than_columns_are_averaged():
    noisy = [(n, 5 + (-1) ** n) for n in range(1000)]
    lines = plot.chart(noisy, title="loss", width=10, height=3).splitlines()
    assert lines[1].split()[0] == "5.000"


def test_a_step_done_again_after_a_restart_counts_once(tmp_path):
    log = EventLog(tmp_path / "events.jsonl")
    for step, loss in [(1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0)]:
        log.write("step", step=step, loss=loss)
    assert "9.000" not in plot.loss_chart(tmp_path)
    assert plot.loss_chart(tmp_path).splitlines()[1].startswith("   3.000 ┤█")


def test_too_few_points_are_said_to_be_too_few(tmp_path):
    assert plot.loss_chart(tmp_path) == "training loss: 0 points, nothing to draw"
