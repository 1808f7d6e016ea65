"""`verify` finds one changed bit in any tensor of a converted folder, of either kind."""

import os
import random
import subprocess
import sys
from contextlib import suppress

import hub_folders
import pytest
import run_job
import torch
from conversion import run

from megatron_mixtral.errors import CheckpointError, InputError
from megatron_mixtral.jobs import verify
from megatron_mixtral.spec.jobs import VerifyConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.rundir import MARKER
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import tensors
from megatron_mixtral.weights.torch_dist import TorchDistFolder


@pytest.fixture
def converted(tmp_path):
    hub_folders.write(tmp_path / "hub", shards=2)
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf", max_shard_gb=0.00001)
    return tmp_path


@pytest.mark.parametrize("name", ["megatron", "back"])
def test_what_was_converted_is_as_it_was(converted, name, capsys):
    verify.run(VerifyConfig(folder=str(converted / name)), converted)
    assert "tensors are as they were converted" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "pattern"), [("megatron", "*.distcp"), ("back", "*.safetensors")])
def test_one_changed_bit_is_found_wherever_it_is(converted, name, pattern):
    needle = hub_folders.read(converted / "hub")
    tensor = "model.layers.1.self_attn.v_proj.weight"
    row = needle[tensor][5].view(torch.uint8).numpy().tobytes()
    (path,) = [p for p in (converted / name).rglob(pattern) if row in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(row) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tensor {tensor}: not what was converted"):
        verify.run(VerifyConfig(folder=str(converted / name)), converted)


@pytest.mark.parametrize("name", ["megatron", "back", "legacy"])
def test_whatever_a_folder_loses_or_has_changed_is_found(converted, name):
    """Tensors aside: what frames them, and all the files that a reader needs beside them."""
    if name == "legacy":
        run(converted / "hub", converted / name, converted, format=name, layout=Layout(expert=2, pipeline=2))
    for path in sorted(p for p in (converted / name).rglob("*") if p.is_file() and p.name != MARKER):
        data, pick = path.read_bytes(), random.Random(path.name)
        for place in {0, len(data) - 1, *(pick.randrange(len(data)) for _ in range(3))}:
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(InputError, match="/"):
                verify.run(VerifyConfig(folder=str(converted / name)), converted)
        path.unlink()
        with pytest.raises(InputError, match=path.name):
            verify.run(VerifyConfig(folder=str(converted / name)), converted)
        path.write_bytes(data)
    verify.run(VerifyConfig(folder=str(converted / name)), converted)


def test_damage_to_what_tells_where_tensors_lie_is_named(converted):
    """Found by reading alone, with no digest to compare: an upstream job's folder has none."""
    release = converted / "megatron" / "release"
    data = (release / ".metadata").read_bytes()
    for place in random.Random(3).sample(range(len(data)), 60):
        (release / ".metadata").write_bytes(data[:place] + bytes([data[place] ^ 32]) + data[place + 1 :])
        with suppress(CheckpointError):
            TorchDistFolder(release).check(tensors.shapes(MixtralShape.from_folder(release)))


def test_the_command_proves_it_and_names_what_has_changed(converted, monkeypatch):
    def typed(*words):
        argv = [sys.executable, "-m", "launcher", *words, "--cluster", "local"]
        home = {"HOME": str(converted), "XDG_STATE_HOME": str(converted / "state")}
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MIXLAUNCH_", "XDG_"))}
        done = subprocess.run(argv, env=environment | home, cwd=converted, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = typed("convert", "verify", "megatron", "-j", "2")
    assert (code, "tensors are as they were converted" in said) == (0, True), said
    (path,) = (converted / "megatron").rglob("__0_0.distcp")
    data = bytearray(path.read_bytes())
    data[-1024] ^= 1  # among the last tensor's numbers
    path.write_bytes(data)
    code, said = typed("convert", "verify", "megatron")
    assert (code, "tensor lm_head.weight: not what was converted" in said) == (2, True), said


def test_two_processes_share_the_work(converted):
    done = run_job.run("verify", {"folder": str(converted / "megatron")}, converted / "run", ranks=2)
    counts = [int(path.read_text().split(" tensors")[0].split()[-1]) for path in done.outputs]
    assert sum(counts) == len(hub_folders.read(converted / "hub"))
    assert min(counts) > 0


def test_a_folder_without_digests_says_so(tmp_path):
    (tmp_path / "mixlaunch.json").write_text('{"format": 1, "kind": "training"}')
    with pytest.raises(InputError, match="records no digests"):
        verify.run(VerifyConfig(folder=str(tmp_path)), tmp_path)
