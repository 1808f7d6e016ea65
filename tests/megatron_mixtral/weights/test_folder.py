"""Which folder a path means, whose it must be, and which old ones go."""

import json

import pytest

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.spec.rundir import MARKER
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights.folder import newest, prune, resolve


def make(folder, complete=True):
    folder.mkdir(parents=True)
    (folder / ".metadata").write_text("")
    if complete:
        weights_folder.write_marker(folder, {"format": 1})
    return folder


def test_a_folder_with_a_marker_means_itself(tmp_path):
    assert resolve(make(tmp_path / "weights")) == tmp_path / "weights"


def test_a_converted_model_means_its_release(tmp_path):
    assert resolve(make(tmp_path / "model" / "release").parent) == tmp_path / "model" / "release"


def test_a_run_means_its_newest_complete_checkpoint(tmp_path):
    run = tmp_path / "run"
    make(run / "checkpoints" / "iter_0000009")
    made = make(run / "checkpoints" / "iter_0000100")
    make(run / "checkpoints" / "iter_0000200", complete=False)
    assert resolve(run) == resolve(run / "checkpoints") == newest(run / "checkpoints") == made


def test_steps_beyond_the_padding_of_their_names_are_still_newer(tmp_path):
    make(tmp_path / "iter_9999999")
    assert resolve(tmp_path) == tmp_path / "iter_9999999"
    assert resolve(make(tmp_path / "iter_10000000").parent) == tmp_path / "iter_10000000"


def test_what_is_there_instead_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no complete checkpoint here; expected mixlaunch\.json"):
        resolve(tmp_path)
    make(tmp_path / "run" / "checkpoints" / "iter_0000003", complete=False)
    with pytest.raises(CheckpointError, match="unfinished: iter_0000003"):
        resolve(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"incomplete, it has no mixlaunch\.json"):
        resolve(tmp_path / "run" / "checkpoints" / "iter_0000003")


def test_a_marker_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    folder = make(tmp_path / "weights", complete=False)

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", crash)
    with pytest.raises(KeyboardInterrupt):
        weights_folder.write_marker(folder, {"format": 1})
    assert not (folder / MARKER).exists()
    monkeypatch.undo()
    weights_folder.write_marker(folder, {"format": 1, "step": 5})
    assert json.loads((folder / MARKER).read_text()) == {"format": 1, "step": 5}


def test_two_complete_checkpoints_are_always_kept(tmp_path):
    for step in (1, 2, 3, 4):
        make(tmp_path / f"iter_000000{step}")
    make(tmp_path / "iter_0000005", complete=False)
    release = make(tmp_path / "release")
    assert [p.name for p in prune(tmp_path, keep=3)] == ["iter_0000001"]
    assert [p.name for p in prune(tmp_path, keep=0)] == ["iter_0000002"]
    assert prune(tmp_path, keep=0) == []
    assert release.exists()


def test_what_killed_saves_left_is_removed_once_a_newer_one_is_whole(tmp_path):
    make(tmp_path / "iter_0000003", complete=False)
    make(tmp_path / ".iter_0000002.unfinished-77", complete=False)
    assert [p.name for p in prune(tmp_path, keep=2)] == [".iter_0000002.unfinished-77"]
    make(tmp_path / "iter_0000005")
    make(tmp_path / "iter_0000006", complete=False)  # may be under way
    assert [p.name for p in prune(tmp_path, keep=2)] == ["iter_0000003"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["iter_0000005", "iter_0000006"]
