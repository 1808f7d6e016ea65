"""This machine as a host: what it runs, and what it finds."""

import sys

from launcher.host.local import Local

SHOWS = "import os, sys; print(os.getcwd(), open(sys.argv[1]).read(), sys.argv[1], os.environ['A']); sys.exit(7)"


def test_a_program_is_attended_in_the_folder_one_is_in(tmp_path, monkeypatch, capfd):
    """Variables such as HF_HOME may be relative to it."""
    monkeypatch.chdir(tmp_path)
    argv = [sys.executable, "-c", SHOWS, "config.yaml"]
    assert Local().attend(argv, {"config.yaml": "a: 1"}, {"A": "x"}) == 7
    folder, *text, path, variable = capfd.readouterr().out.split()
    assert (folder, text, variable) == (str(tmp_path), ["a:", "1"], "x")
    assert not list(tmp_path.iterdir())
    assert Local().exist([path, str(tmp_path)]) == [False, True]


def test_of_a_pattern_the_last_text_is_read(tmp_path):
    for name in ("b", "a/iter_1", "a/iter_2"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(name)
    folders = [str(tmp_path / name) for name in ("a", "b", "c")]
    assert list(Local().texts(folders, ("config.json", "iter_*/config.json"))) == ["a/iter_2", "b"]
