"""Another try of a run on this machine: what is refused before anything is touched."""

import json

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli


@pytest.fixture
def failed(home, tmp_path, monkeypatch):
    """The name of a run that failed here."""
    python = tmp_path / "python"
    python.write_text("#!/bin/bash\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setenv("MIXLAUNCH_PYTHON", str(python))
    typed("tiny", "--output", str(tmp_path / "m"))
    return json.loads(typed("status", "--json").output)[0]["name"]


def typed(*argv):
    return CliRunner().invoke(cli, list(argv))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("retry", "--time", "soon"), "--time: 'soon'"),
        (("retry", "--exclude", "a;b"), "--exclude: 'a;b'"),
        (("retry", "--exclude", "gpu1"), "this run is on this machine only"),
        (("resume",), "tiny saves nothing to resume from; `mixlaunch retry"),
    ],
)
def test_mistakes_end_with_2_and_touch_nothing(failed, home, argv, said):
    [run] = (home / "state" / "mixlaunch" / "runs").iterdir()
    before = {path: path.read_text() for path in run.rglob("*") if path.is_file() and path.suffix != ".pkl"}
    refused = typed(argv[0], failed, *argv[1:])
    assert (refused.exit_code, said in refused.output) == (2, True), refused.output
    assert {path: path.read_text() for path in before} == before


def test_a_run_that_isnt_there_is_named():
    refused = typed("retry", "nothing")
    assert (refused.exit_code, "there are no runs in" in refused.output) == (2, True)
