"""`mixlaunch plot`: finds the run, has it drawn by the job's own package, and passes mistakes on."""

import json

import pytest
from click.testing import CliRunner
from local_runs import ended, job_that

from launcher.cli.main import cli
from launcher.submit import start

pytest.importorskip("matplotlib")


def test_a_run_is_drawn_by_its_name(tmp_path):
    run = start.run(job_that("exit 0", tmp_path), asked=["tiny"])
    ended(run)
    empty = CliRunner().invoke(cli, ["plot", run.name])
    assert (empty.exit_code, "no step is done yet" in empty.output) == (2, True)
    steps = [{"time": n, "event": "step", "step": n, "loss": 1 / n, "expert_load": 1.5} for n in range(1, 9)]
    (run.path / "events.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    drawn = CliRunner().invoke(cli, ["plot", run.name])
    assert (drawn.exit_code, drawn.output.strip()) == (0, str(run.path / "plot.png"))
    assert (run.path / "plot.png").read_bytes()[:4] == b"\x89PNG"
    target = tmp_path / "mine.pdf"
    assert CliRunner().invoke(cli, ["plot", str(run.path), "-o", str(target)]).exit_code == 0
    assert target.read_bytes()[:4] == b"%PDF"
    wrong = CliRunner().invoke(cli, ["plot", run.name, "-o", str(tmp_path / "x.nonsense")])
    assert wrong.exit_code != 0
    assert "nonsense" in wrong.output
