"""What `convert` refuses, on real files: one message naming file and tensor, nothing under the output's name."""

import json
import os
import pickle
import shutil

import hub_folders
import pytest
import run_job
import torch

from megatron_mixtral.errors import CheckpointError, InputError, JobError
from megatron_mixtral.jobs import convert
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.weights import convert as converting
from megatron_mixtral.weights import shared_work
from megatron_mixtral.weights.copying import digests
from megatron_mixtral.weights.hub import HubFolder

TENSOR = "model.layers.1.self_attn.k_proj.weight"
FIRST, SECOND = (f"model-0000{n}-of-00002.safetensors" for n in (1, 2))


def run(source, output, **config):
    output.parent.mkdir(exist_ok=True)
    convert.run(ConvertConfig(source=str(source), output=str(output), **config), output.parent)


@pytest.fixture
def hub(tmp_path):
    hub_folders.write(tmp_path / "hub", shards=2)
    return tmp_path / "hub"


@pytest.fixture
def out(tmp_path):
    """Where nothing may appear."""
    yield tmp_path / "made" / "out"
    left = sorted(p.name for p in (tmp_path / "made").iterdir()) if (tmp_path / "made").exists() else []
    assert left == []


def rewrite(hub, change):
    """The folder's tensors after `change(tensors)`, in two shards again."""
    tensors = hub_folders.read(hub)
    change(tensors)
    hub_folders.write_shards(hub, tensors, 2)


def edit_header(path, change):
    """Change a safetensors header in place of the old one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def truncated(hub):
    os.truncate(hub / SECOND, (hub / SECOND).stat().st_size - 1)


def cut_within_header(hub):
    os.truncate(hub / FIRST, 100)


def empty(hub):
    os.truncate(hub / FIRST, 0)


def garbage(hub):
    (hub / FIRST).write_bytes(b"\x10\0\0\0\0\0\0\0" + b"not a header at all")


def pointer_of_git_lfs(hub):
    (hub / FIRST).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4892809584\n")


def huge_header(hub):
    (hub / FIRST).write_bytes(b"\xff" * 64)


def header_too_long(hub):
    """As long as a whole shard of weights might be: it isn't read to find out."""
    with (hub / FIRST).open("r+b") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)


def header_too_deep(hub):
    (hub / FIRST).write_bytes((100_000).to_bytes(8, "little") + b"[" * 100_000)


def longer(hub):
    with (hub / FIRST).open("ab") as stream:
        stream.write(b"\0" * 7)


def overlap(hub):
    def change(header):
        for entry in header.values():
            entry["data_offsets"] = [0, entry["data_offsets"][1] - entry["data_offsets"][0]]

    edit_header(hub / FIRST, change)


def odd_type(hub):
    def change(header):
        next(iter(header.values()))["dtype"] = "F8_E4M3"

    edit_header(hub / FIRST, change)


def type_that_is_none(hub):
    edit_header(hub / FIRST, lambda header: next(iter(header.values())).update(dtype=["BF16"]))


def missing_file(hub):
    (hub / SECOND).unlink()


def missing_tensor(hub):
    rewrite(hub, lambda tensors: tensors.pop(TENSOR))


def extra_tensor(hub):
    rewrite(hub, lambda tensors: tensors.update({"model.layers.7.mlp.bias": tensors[TENSOR].clone()}))


def wrong_shape(hub):
    rewrite(hub, lambda tensors: tensors.update({TENSOR: tensors[TENSOR][:-1].clone()}))


def not_in_the_index(hub):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][TENSOR]
    path.write_text(json.dumps(index))


def index_places_it_elsewhere(hub):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.nothing"] = FIRST
    path.write_text(json.dumps(index))


def index_places_it_in_the_other_file(hub):
    path = hub / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][TENSOR] = FIRST if index["weight_map"][TENSOR] == SECOND else SECOND
    path.write_text(json.dumps(index))


def index_too_deep(hub):
    (hub / "model.safetensors.index.json").write_text('{"weight_map": ' + "[" * 100_000)


def index_damaged(hub):
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {')


def index_leaves_the_folder(hub):
    (hub / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../etc/passwd"}}')


def pickles(hub):
    for path in hub.glob("*.safetensors*"):
        path.unlink()
    (hub / "pytorch_model-00001-of-00001.bin").write_bytes(b"\x80\x02")


def no_weights(hub):
    for path in hub.glob("*.safetensors*"):
        path.unlink()


def no_config(hub):
    (hub / "config.json").unlink()


def layers_without_number(hub):
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10**9}))


def other_model(hub):
    (hub / "config.json").write_text('{"model_type": "llama"}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, rf"{SECOND}: truncated: tensor \S+ ends at \d+, the file at \d+"),
        (cut_within_header, rf"{FIRST}: truncated"),
        (empty, rf"{FIRST}: truncated"),
        (garbage, rf"{FIRST}: damaged header"),
        (pointer_of_git_lfs, rf"{FIRST}: a pointer of Git LFS.*git lfs pull"),
        (huge_header, rf"{FIRST}: truncated or no safetensors"),
        (header_too_long, rf"{FIRST}: truncated or no safetensors"),
        (header_too_deep, rf"{FIRST}: damaged header"),
        (longer, rf"{FIRST}: 7 bytes behind the last tensor"),
        (overlap, rf"{FIRST}: tensor \S+ begins at"),
        (odd_type, rf"{FIRST}: tensor \S+ is F8_E4M3; supported are BF16, F16, F32"),
        (type_that_is_none, rf"{FIRST}: tensor \S+: damaged header: .*dtype must be a word"),
        (missing_file, rf"index.json: names {SECOND}, which isn't there"),
        (missing_tensor, rf"tensor {TENSOR} is missing"),
        (extra_tensor, r"model-\d+-of-00002.safetensors: tensor model.layers.7.mlp.bias isn't part of the model"),
        (wrong_shape, rf"tensor {TENSOR} has shape \[7, 16\]; config.json makes it \[8, 16\]"),
        (not_in_the_index, rf"tensor {TENSOR}, which model.safetensors.index.json doesn't name"),
        (index_places_it_elsewhere, rf"{FIRST}: tensor model.nothing, which \S+ places here, is missing"),
        (index_places_it_in_the_other_file, rf"holds tensor {TENSOR}, which \S+index.json places in model-0000"),
        (index_too_deep, r"model.safetensors.index.json: not an index"),
        (index_damaged, r"model.safetensors.index.json: not an index"),
        (index_leaves_the_folder, r"plain file names"),
        (pickles, r"pytorch_model-00001-of-00001.bin: weights in a pickle"),
        (no_weights, r"hub: holds no \*.safetensors"),
        (no_config, r"config.json"),
        (layers_without_number, r"hub: holds 60 tensors; config.json tells of 1000000000 layers of 4 experts"),
        (other_model, r"model_type is 'llama'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_hub_folder_is_refused_by_file_and_tensor(hub, out, damage, words):
    damage(hub)
    with pytest.raises(InputError, match=words) as raised:
        run(hub, out)
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 5}, "hidden_size 16 / num_attention_heads 5 isn't whole"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 / num_key_value_heads 3 isn't whole"),
        ({"num_local_experts": 0}, "num_local_experts is 0; it must be a whole number above 0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers is '3'"),
        ({"vocab_size": 67.0}, "vocab_size is 67.0"),
        ({"sliding_window": -1}, "sliding_window is -1"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 of num_local_experts 4"),
        ({"hidden_size": None}, "hidden_size missing"),
        ({"hidden_size": float("nan")}, "hidden_size is nan"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; it must be a number above 0"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'; it must be a boolean"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings is '4k'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters asks for 'yarn'"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling asks for 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"model_type": None}, "model_type is None"),
    ],
)
def test_sizes_that_no_model_can_have_are_named(hub, out, changes, words):
    config = json.loads((hub / "config.json").read_text())
    (hub / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=rf"hub/config.json: .*{words}"):
        run(hub, out)


@pytest.mark.parametrize("text", ["[]", '"mixtral"', "{", "\x80", "[" * 100_000])
def test_a_config_that_is_none_is_named(hub, out, text):
    (hub / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"hub/config.json: "):
        run(hub, out)


def test_a_place_that_cannot_be_written_is_a_fault_that_names_it(hub, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(JobError, match=r"file/out\S*: Not a directory"):
        run_to(hub, tmp_path / "file" / "out", tmp_path)


def run_to(source, output, run_dir):
    convert.run(ConvertConfig(source=str(source), output=str(output)), run_dir)


@pytest.fixture
def megatron(hub, tmp_path):
    run(hub, tmp_path / "first" / "megatron")
    return tmp_path / "first" / "megatron"


def release_file(folder, number=0):
    return folder / "release" / f"__{number}_0.distcp"


def truncated_shard(folder):
    os.truncate(release_file(folder), release_file(folder).stat().st_size // 2)


def missing_shard(folder):
    release_file(folder).unlink()


def damaged_archive(folder):
    data = bytearray(release_file(folder).read_bytes())
    at = data.index(b"_rebuild_tensor_v2")
    data[at : at + 8] = b"evil_fun"
    release_file(folder).write_bytes(data)


def damaged_metadata(folder):
    (folder / "release" / ".metadata").write_bytes(b"\x80\x04nonsense")


def no_metadata(folder):
    (folder / "release" / ".metadata").unlink()


def incomplete(folder):
    (folder / "release" / "mixlaunch.json").unlink()


def another_shape(folder):
    path = folder / "release" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 25}))


def fewer_layers(folder):
    path = folder / "release" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": True}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated_shard, r"__0_0.distcp: truncated: tensor \S+ ends at"),
        (missing_shard, r"__0_0.distcp: missing; holds a part of tensor"),
        (damaged_metadata, r".metadata: damaged"),
        (no_metadata, r".metadata: missing"),
        (incomplete, r"no complete checkpoint|no mixlaunch.json|not finished"),
        (
            another_shape,
            r"tensor \S+linear_fc1.weight has shape \[3, 4, 48, 16\]; config.json makes it \[3, 4, 50, 16\]",
        ),
        (fewer_layers, r"tensor output_layer.weight isn't part of the model"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bad_weights_folder_is_refused_by_file_and_tensor(megatron, out, damage, words):
    damage(megatron)
    with pytest.raises(CheckpointError, match=words) as raised:
        run(megatron, out, to="hf")
    assert raised.value.exit_code == 2


def test_a_folder_in_the_wanted_layout_already_is_told_so(hub, megatron, out, tmp_path):
    for folder in (megatron, megatron / "release"):
        with pytest.raises(InputError, match=r"in Megatron's layout already; --to hf"):
            run(folder, out)
    run(megatron, tmp_path / "first" / "back", to="hf")
    for folder in (hub, tmp_path / "first" / "back"):
        with pytest.raises(InputError, match=r"in the hub's layout already"):
            run(folder, out, to="hf")


def test_an_archive_of_something_else_is_refused(megatron, tmp_path):
    damaged_archive(megatron)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: tensor embedding\S+ at \d+: damaged: .*not a tensor"):
        run(megatron, tmp_path / "out", to="hf")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_a_changed_bit_in_a_folder_of_our_own_is_found_on_its_way_on(megatron, tmp_path, to):
    """Nothing about its size or structure is wrong: its digest alone tells."""
    needle = hub_folders.read(tmp_path / "hub")[TENSOR].view(torch.uint8).numpy().tobytes()[:32]
    source, kind = megatron, "*.distcp"
    if to == "megatron":
        run(megatron, tmp_path / "first" / "back", to="hf")
        source, kind = tmp_path / "first" / "back", "*.safetensors"
    (path,) = [p for p in source.rglob(kind) if needle in p.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(needle) + 3] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{path.name}: tensor {TENSOR}: damaged"):
        run(source, tmp_path / "second" / "out", to=to)
    assert not (tmp_path / "second" / "out").exists()
    run(source, tmp_path / "second" / "other", to=to, dtype="float32")  # no digest to compare with


class Trap:
    """Unpickled as pickle would, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_hidden_in_a_checkpoint_does_not_run(megatron, out, tmp_path):
    for content in (Trap(tmp_path / "sprung"), {"storage_data": Trap(tmp_path / "sprung")}):
        (megatron / "release" / ".metadata").write_bytes(pickle.dumps(content))
        with pytest.raises(CheckpointError, match=r"\.metadata: damaged"):
            run(megatron, out, to="hf")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # it would have


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"to": "gguf"}, "'gguf' isn't one of megatron, hf"),
        ({"dtype": "int8"}, "'int8' isn't one of bfloat16, float16, float32"),
        ({"max_shard_gb": 0.0}, "isn't a size"),
    ],
)
def test_a_wrong_option_names_the_valid_ones(hub, out, config, words):
    with pytest.raises(InputError, match=words):
        run(hub, out, **config)


def test_a_layout_that_cannot_hold_the_model_is_refused(hub, out):
    from megatron_mixtral.spec.layout import Layout

    with pytest.raises(InputError, match="4 / 3"):
        run(hub, out, layout=Layout(expert=3))


def test_a_folder_that_holds_something_else_is_left_alone(hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match=r"out: holds something else \(thesis.tex\)"):
        run(hub, out)
    assert [p.name for p in out.iterdir()] == ["thesis.tex"]
    partial = tmp_path / "new.partial"
    out.rename(partial)
    with pytest.raises(InputError, match=r"new.partial: holds something else"):
        run(hub, tmp_path / "new")
    assert [p.name for p in partial.iterdir()] == ["thesis.tex"]


def test_a_link_means_the_folder_that_it_points_to(hub, tmp_path):
    (tmp_path / "scratch").mkdir()
    for target in ("scratch", "not there/yet"):
        link = tmp_path / f"link to {target.replace('/', ' ')}"
        link.symlink_to(target)
        run(hub, link)
        assert link.is_symlink()
        assert (tmp_path / target / "release" / "mixlaunch.json").exists()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: a link that leads to itself"):
        run(hub, tmp_path / "loop")
    assert not list(tmp_path.rglob("*.partial"))


def test_what_no_folder_can_replace_is_refused_before_anything_is_written(hub, tmp_path, monkeypatch):
    (tmp_path / "taken.partial").write_text("a file")
    with pytest.raises(InputError, match=r"taken.partial: holds something else"):
        run(hub, tmp_path / "taken")
    for path in ("/", "a\0b"):
        with pytest.raises(InputError, match=r"^/: holds something else|not a path"):
            run_to(hub, path, tmp_path)
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr("pathlib.Path.is_mount", lambda self: self.name == "disk")
    with pytest.raises(InputError, match=r"disk: is a mount point"):
        run(hub, tmp_path / "disk")
    assert sorted(p.name for p in tmp_path.glob("*.partial")) == ["taken.partial"]


def test_an_empty_folder_is_taken(hub, tmp_path):
    (tmp_path / "out").mkdir()
    run(hub, tmp_path / "out")
    assert (tmp_path / "out" / "release" / "mixlaunch.json").exists()


def test_the_same_again_is_done_already_and_another_conversion_is_refused(hub, tmp_path, capsys):
    out = tmp_path / "out"
    run(hub, out)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    run(hub, out)
    assert "done already" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"out: holds another conversion \(other dtype\)"):
        run(hub, out, dtype="float32")
    rewrite(hub, lambda tensors: tensors[TENSOR].mul_(2))
    with pytest.raises(InputError, match=r"out: holds another conversion \(other files\)"):
        run(hub, out)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_an_unfinished_other_conversion_is_refused(hub, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr(shared_work.Work, "publish", lambda self: (_ for _ in ()).throw(JobError("killed")))
        with pytest.raises(JobError, match="killed"):
            run(hub, out)
    with pytest.raises(InputError, match=r"out.partial: holds another conversion, unfinished \(other dtype\)"):
        run(hub, out, dtype="float32")
    run(hub, out)
    assert not (tmp_path / "out.partial").exists()


def test_checks_asked_for_later_are_made_later(hub, tmp_path, monkeypatch, capsys):
    """What is there already, finished or in part, was written without them."""
    rewrite(hub, lambda tensors: tensors[TENSOR].view(-1)[3:4].fill_(float("nan")))
    part, whole = tmp_path / "part", tmp_path / "whole"
    with monkeypatch.context() as patched:
        patched.setattr(shared_work.Work, "publish", lambda self: (_ for _ in ()).throw(JobError("killed")))
        with pytest.raises(JobError, match="killed"):
            run(hub, part)
    run(hub, whole)
    for out in (part, whole):
        with pytest.raises(InputError, match=rf"tensor {TENSOR}: holds NaN"):
            run(hub, out, check_finite=True)
    with pytest.raises(CheckpointError, match=r"logits.*largest difference nan"):
        run(hub, whole, check_logits=True)
    read_back = []
    monkeypatch.setattr(converting, "digests", lambda *args: read_back.append(args[1]) or digests(*args))
    for out in (part, whole):
        run(hub, out, verify=True)
        assert len(read_back) == 1
        read_back.clear()
    data = bytearray(release_file(whole).read_bytes())
    data[-2000] ^= 1  # among the last tensor's numbers
    release_file(whole).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"__0_0.distcp: tensor lm_head.weight: not what was converted"):
        run(hub, whole, verify=True)


def test_a_disk_too_small_is_refused_before_anything_is_written(hub, out, monkeypatch):
    usage = shutil.disk_usage(hub)
    monkeypatch.setattr(shared_work.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"GB to write and 0.0 GB free"):
        run(hub, out)


def test_a_file_lost_halfway_is_a_fault_that_names_it(hub, tmp_path, monkeypatch):
    checked = HubFolder.check

    def lose(self, wanted):
        checked(self, wanted)
        os.truncate(hub / SECOND, 5000)

    monkeypatch.setattr(HubFolder, "check", lose)
    with pytest.raises(JobError, match=rf"{SECOND}: ends at 5000, \d+ bytes short; .* in tensor model") as raised:
        run(hub, tmp_path / "out")
    assert raised.value.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_the_job_exits_2_with_one_line_and_no_traceback(hub, tmp_path):
    truncated(hub)
    job = run_job.Job("convert", {"source": str(hub), "output": str(tmp_path / "out")}, tmp_path / "run", ranks=2)
    assert job.wait() == [2, 2]
    said = job.outputs[0].read_text()
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert not list(tmp_path.glob("out*"))
