"""torch's formats without torch, held against torch: what we write it reads, what it writes we read."""

import io
import pickle
import subprocess
import sys
import zipfile

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_mixtral.weights import torch_archive
from megatron_mixtral.weights.torch_archive import Chunk, Tensor


@pytest.mark.parametrize("dtype", sorted(torch_archive.ITEMSIZE))
@pytest.mark.parametrize("sizes", [(7,), (1, 3, 5), (2, 1, 4, 300)])
def test_torch_loads_a_framed_tensor_from_memory_and_mapped(tmp_path, dtype, sizes):
    tensor = torch.randn(sizes).to(getattr(torch, dtype))
    before, after = torch_archive.frame(sizes, dtype)
    assert len(before) % 64 == 0
    data = before + tensor.view(torch.uint8).numpy().tobytes() + after
    assert torch.equal(torch.load(io.BytesIO(data)), tensor)
    (tmp_path / "tensor.pt").write_bytes(data)
    assert torch.equal(torch.load(tmp_path / "tensor.pt", mmap=True), tensor)


def test_torch_loads_an_archived_value_and_so_does_unzip():
    value = [None, {"a": 1.5, "b": {"c": False}}, "text"]
    data = torch_archive.archive(value)
    assert torch.load(io.BytesIO(data), weights_only=True) == value
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None


@pytest.mark.parametrize("dtype", sorted(torch_archive.ITEMSIZE))
def test_we_find_the_bytes_that_torch_saved(tmp_path, dtype):
    tensor = torch.randn(3, 5).to(getattr(torch, dtype))
    with (tmp_path / "file").open("wb") as stream:
        stream.write(b"before")
        torch.save(tensor, stream)
        length = stream.tell() - 6
        stream.write(b"after")
    chunk = Chunk((0, 0), (3, 5), "file", 6, length)
    place = torch_archive.find_bytes(tmp_path, chunk, dtype)
    raw = tensor.view(torch.uint8).numpy().tobytes()
    assert (tmp_path / "file").read_bytes()[place : place + len(raw)] == raw


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (torch.zeros(5, 3).t(), "with strides"),
        (torch.zeros(3, 4), "should be in a row"),
        (torch.zeros(3, 5, dtype=torch.bfloat16), "bfloat16, not float32"),
        ({"a": 1}, "not a tensor|data/0"),
    ],
)
def test_another_thing_than_expected_is_named(tmp_path, saved, words):
    torch.save(saved, tmp_path / "file")
    chunk = Chunk((0, 0), (3, 5), "file", 0, (tmp_path / "file").stat().st_size)
    with pytest.raises((ValueError, KeyError), match=words):
        torch_archive.find_bytes(tmp_path, chunk, "float32")


def test_metadata_is_what_torchs_own_classes_would_be(tmp_path):
    dcp.save(
        {"a.weight": torch.zeros(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    theirs = dcp.FileSystemReader(tmp_path).read_metadata()
    found = torch_archive.read_metadata(tmp_path / ".metadata")
    assert found["a.weight"].dtype == "float32"
    assert found["b"].shape == (2,)
    ours = pickle.loads(torch_archive.metadata(found, {"c/shard_0_1": ("file", 0, 9)}))
    for name in ("a.weight", "b"):
        one, other = theirs.state_dict_metadata[name], ours.state_dict_metadata[name]
        assert isinstance(other, TensorStorageMetadata)
        assert (one.properties, one.size, one.chunks) == (other.properties, other.size, other.chunks)
    assert {k: v for k, v in ours.storage_data.items() if k.fqn != "c/shard_0_1"} == theirs.storage_data
    assert dcp.BytesStorageMetadata() == ours.state_dict_metadata["c/shard_0_1"]


def test_what_we_write_we_read(tmp_path):
    chunks = [Chunk((0, 0), (2, 3), "x", 64, 99), Chunk((2, 0), (2, 3), "y", 0, 98)]
    tensors = {"a": Tensor("float16", (4, 3), chunks)}
    (tmp_path / ".metadata").write_bytes(torch_archive.metadata(tensors, {"o": ("z", 0, 1)}))
    assert torch_archive.read_metadata(tmp_path / ".metadata") == tensors


def test_converting_imports_no_torch():
    modules = "megatron_mixtral.jobs.convert, megatron_mixtral.jobs.verify"
    code = f"import {modules}, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
