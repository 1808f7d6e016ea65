"""What a checkpoint's pickles name isn't called: by our readers, and by a job that is given the folder."""

import io
import os
import pickle
import shutil
from types import SimpleNamespace

import pytest
import run_job

from megatron_mixtral import mcore  # noqa: F401 (puts our readers in torch's place)


class Evil:
    """Unpickled as it comes, it leaves a file behind."""

    def __init__(self, path, call=os.system, words="touch {}"):
        self.made = call, (words.format(path),)

    def __reduce__(self):
        return self.made


def evils(path):
    yield Evil(path)
    yield Evil(path, eval, "open('{}', 'w')")
    yield {"state_dict_metadata": [Evil(path, exec, "open('{}', 'w')")]}


def test_metadata_that_calls_is_refused_by_what_it_names(tmp_path):
    from torch.distributed.checkpoint import FileSystemReader

    for evil in evils(tmp_path / "ran"):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(pickle.UnpicklingError, match=r"it names (posix\.system|builtins\.(eval|exec))"):
            FileSystemReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.")
    with pytest.raises(pickle.UnpicklingError, match=r"builtins\.getattr"):
        FileSystemReader(tmp_path).read_metadata()
    (tmp_path / ".metadata").write_bytes(pickle.dumps({}))
    with pytest.raises(pickle.UnpicklingError, match="holds a dict"):
        FileSystemReader(tmp_path).read_metadata()
    assert not (tmp_path / "ran").exists()


def loaded(value):
    import torch
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.state_dict = {}
    planner.load_bytes(SimpleNamespace(dest_index=SimpleNamespace(fqn="rank")), stream)
    return planner.state_dict["rank"]


def test_objects_among_the_tensors_are_values_alone(tmp_path):
    import random

    import numpy
    import torch

    for evil in evils(tmp_path / "ran"):
        with pytest.raises(pickle.UnpicklingError):
            loaded(evil)
    assert not (tmp_path / "ran").exists()
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    found = loaded(state)
    assert found["python"] == state["python"]
    assert (found["numpy"][1] == state["numpy"][1]).all()
    assert torch.equal(found["torch"], state["torch"])


@pytest.mark.parametrize("file", [".metadata", "common.pt"])
def test_a_job_runs_nothing_that_a_folder_holds(served_model, tmp_path, file):
    folder = tmp_path / "model"
    shutil.copytree(served_model[1], folder)
    found = next(folder.rglob(file))
    if file == ".metadata":
        found.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    else:
        import torch

        torch.save(Evil(tmp_path / "ran"), found)
    job = run_job.Job("serve", {"model": str(folder), "port": 0, "precision": "fp32"}, tmp_path / "run")
    try:
        if file == ".metadata":
            assert job.wait(90) == [2]
            assert ".metadata" in job.output()
        else:  # serving doesn't read it
            job.wait_for("ready", timeout=90)
    finally:
        job.close()
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_another_owners_folder_is_read_like_ones_own(served_model, tmp_path):
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.spec.shape import MixtralShape

    folder = tmp_path / "model"
    shutil.copytree(served_model[1] / "release", folder)
    for path in (folder, *folder.iterdir()):
        os.chown(path, 65534, -1)
    save_load.verify(folder, MixtralShape.from_folder(folder))
