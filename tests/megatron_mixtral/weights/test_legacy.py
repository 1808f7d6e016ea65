"""`--layout legacy`: megatron-core's own GPTModel loads each rank's file strictly and computes what it should."""

import json
import struct
import zipfile
from fractions import Fraction
from pathlib import Path

import hub_folders
import pytest
import torch
from conversion import contents, run
from spawn_ranks import ranks

from megatron_mixtral.errors import CheckpointError, InputError, LayoutError
from megatron_mixtral.jobs import verify
from megatron_mixtral.spec.jobs import VerifyConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import legacy, torch_archive

VOCABULARY = 37  # padded to 40 below, more under tensor parallelism
SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "vocab_size": VOCABULARY,
    "head_dim": 8,
}
LAYOUTS = {
    "alone": {},
    "tp2": {"tensor": 2, "expert_tensor": 2},
    "tp2_etp1": {"tensor": 2},
    "pp2": {"pipeline": 2},  # 3 layers: uneven
    "ep2": {"expert": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
}
SHAPES = {"untied": {}, "tied": {"tie_word_embeddings": True}}
OPTIONS = {"format": "legacy", "names": "local", "make_vocab_size_divisible_by": 8}
TOKENS = torch.arange(1, 12)[None]


def own_model(shape, layout):
    """A GPTModel made of megatron-core's local layers: nothing of ours in it but the sizes."""
    from megatron_mixtral.model import build

    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = build.transformer_config(
        shape, layout, precision="fp32", aux_loss=0.0, moe_grouped_gemm=False, sequence_parallel=False
    )
    spec = get_gpt_layer_local_spec(num_experts=shape.num_local_experts, normalization="RMSNorm")
    multiple = 8 * layout.tensor
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=-(-shape.vocab_size // multiple) * multiple,
        max_sequence_length=64,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=shape.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.rope_theta,
    ).eval()


def loads(cases):
    """For each case the rank's logits, None on a stage before the last, after a strict load of its file."""
    from megatron_mixtral.mcore import ranks

    from megatron.core import parallel_state as state

    found = []
    for folder, axes in cases:
        shape, layout = MixtralShape.from_folder(Path(folder, "hub")), Layout(**axes)
        ranks.initialize(layout, timeout=60)
        model = own_model(shape, layout)
        name = f"mp_rank_{state.get_tensor_model_parallel_rank():02d}"
        if layout.pipeline > 1:
            name += f"_{state.get_pipeline_model_parallel_rank():03d}"
        if layout.expert > 1:
            name += f"_{state.get_expert_model_parallel_rank():03d}"
        out = Path(folder, "_".join(axes) or "alone")
        file = torch.load(out / "release" / name / "model_optim_rng.pt", weights_only=True)
        assert (file["checkpoint_version"], file["iteration"]) == (3.0, 0)
        model.load_state_dict(file["model"], strict=True)
        found.append(logits_of(model, shape, layout))
    ranks.shutdown()
    return found


def logits_of(model, shape, layout):
    import torch.distributed as dist

    from megatron.core import parallel_state as state

    length = TOKENS.shape[1]
    positions, mask = torch.arange(length)[None], torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        if not state.is_pipeline_first_stage():
            hidden = torch.empty(length, 1, shape.hidden_size)
            dist.recv(hidden, 0)
            model.set_input_tensor(hidden)
        output = model(TOKENS, positions, mask)
        if not state.is_pipeline_last_stage():
            dist.send(output, 1)
            return None
    return output[..., : shape.vocab_size].numpy()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders of each shape with its files at each layout, and transformers' logits."""
    from transformers import MixtralForCausalLM

    folders, expected = {}, {}
    for name, changes in SHAPES.items():
        folders[name] = tmp_path_factory.mktemp(name)
        hub_folders.write(folders[name] / "hub", dtype="float32", **SHAPE, **changes)
        for axes in LAYOUTS.values():
            out = folders[name] / ("_".join(axes) or "alone")
            run(folders[name] / "hub", out, folders[name], layout=Layout(**axes), verify=True, **OPTIONS)
        model = MixtralForCausalLM.from_pretrained(folders[name] / "hub", dtype=torch.float32)
        with torch.no_grad():
            expected[name] = model(TOKENS).logits
    return folders, expected


def near(found, expected):
    return (torch.from_numpy(found) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture(scope="module")
def on_two(converted):
    folders, _ = converted
    cases = [(name, label) for name in folders for label in LAYOUTS]
    found = ranks(2, loads, [(str(folders[name]), LAYOUTS[label]) for name, label in cases])
    return {
        case: [logits for logits in both if logits is not None] for case, *both in zip(cases, *found, strict=True)
    }


@pytest.mark.parametrize("label", LAYOUTS)
@pytest.mark.parametrize("name", SHAPES)
def test_two_ranks_load_strictly_and_compute_what_transformers_does(converted, on_two, name, label):
    found = on_two[name, label]
    assert len(found) == (1 if "pipeline" in LAYOUTS[label] else 2)
    assert all(near(logits, converted[1][name]) for logits in found)


@pytest.mark.parametrize("axes", [*LAYOUTS.values(), {"tensor": 2, "expert_tensor": 2, "expert": 2, "pipeline": 3}])
@pytest.mark.parametrize("names", legacy.NAMES)
def test_what_was_written_comes_back_bit_identical(tmp_path, names, axes):
    given = hub_folders.write(tmp_path / "hub", shards=2, **SHAPE, num_local_experts=4)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, layout=Layout(**axes), **OPTIONS | {"names": names})
    run(tmp_path / "out", tmp_path / "back", tmp_path, to="hf", verify=True)
    hub_folders.assert_same(hub_folders.read(tmp_path / "back"), given)


def keys(folder: Path) -> dict[str, set[str]]:
    return {
        path.parent.name: set(torch.load(path, weights_only=True)["model"])
        for path in sorted((folder / "release").glob("*/*.pt"))
    }


def test_folders_and_keys_are_named_as_upstream_names_them(tmp_path):
    hub_folders.write(tmp_path / "hub", **SHAPE)
    layout = Layout(tensor=2, expert_tensor=2, expert=2, pipeline=3)
    for names in legacy.NAMES:
        run(tmp_path / "hub", tmp_path / names, tmp_path, layout=layout, **OPTIONS | {"names": names})
    found = keys(tmp_path / "te-grouped")
    assert sorted(found) == [f"mp_rank_0{t}_00{p}_00{e}" for t in (0, 1) for p in (0, 1, 2) for e in (0, 1)]
    layer = "decoder.layers.0"
    always = {f"{layer}.pre_mlp_layernorm.weight", f"{layer}.mlp.router.weight"}
    attention = {f"{layer}.self_attention.linear_{part}.weight" for part in ("qkv", "proj")}
    engine = {f"{layer}.self_attention.linear_qkv.layer_norm_weight"}
    engine |= {f"{layer}.self_attention.linear_{part}._extra_state" for part in ("qkv", "proj")}
    middle = {name: keys(tmp_path / name)["mp_rank_00_001_001"] - always - attention for name in legacy.NAMES}
    experts = [f"{layer}.mlp.experts.local_experts.{e}.linear_fc{n}" for e in (0, 1) for n in (1, 2)]
    assert middle["local"] == {f"{layer}.input_layernorm.weight", *(f"{e}.weight" for e in experts)}
    assert middle["te"] == engine | {f"{e}.{what}" for e in experts for what in ("weight", "_extra_state")}
    grouped = {
        f"{layer}.mlp.experts.linear_fc{n}.{w}" for n in (1, 2) for w in ("weight0", "weight1", "_extra_state")
    }
    assert middle["te-grouped"] == engine | grouped
    assert "embedding.word_embeddings.weight" in found["mp_rank_01_000_000"]
    assert {"decoder.final_layernorm.weight", "output_layer.weight"} < found["mp_rank_01_002_001"]
    assert (tmp_path / "te" / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert keys(tmp_path / "te").keys() == found.keys()


@pytest.mark.parametrize(("tensor", "rows"), [(1, 128), (2, 256)])
def test_the_vocabulary_is_padded_as_upstream_pads_it(tmp_path, tensor, rows):
    given = hub_folders.write(tmp_path / "hub", **SHAPE)["lm_head.weight"]
    run(
        tmp_path / "hub",
        tmp_path / "out",
        tmp_path,
        layout=Layout(tensor=tensor, expert_tensor=tensor),
        format="legacy",
    )
    files = sorted((tmp_path / "out" / "release").glob("*/*.pt"))
    whole = torch.cat([torch.load(path, weights_only=True)["model"]["output_layer.weight"] for path in files])
    assert torch.equal(whole, torch.cat([given, given[-1:].expand(rows - VOCABULARY, -1)]))


def test_any_other_type_and_a_changed_bit_are_seen(tmp_path):
    given = hub_folders.write(tmp_path / "hub", **SHAPE)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, dtype="float16", layout=Layout(expert=2), **OPTIONS)
    verify.run(VerifyConfig(folder=str(tmp_path / "out")), tmp_path)
    path = tmp_path / "out" / "release" / "mp_rank_00_001" / "model_optim_rng.pt"
    key = "decoder.layers.2.mlp.experts.local_experts.1.linear_fc2.weight"
    stored = torch.load(path)["model"][key]
    assert torch.equal(stored, given["model.layers.2.block_sparse_moe.experts.3.w2.weight"].half())
    data = bytearray(path.read_bytes())
    data[data.index(stored.view(torch.uint8).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"tensor mp_rank_00_001/{key}: not what was converted"):
        verify.run(VerifyConfig(folder=str(tmp_path / "out")), tmp_path)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def gone(path):
    path.unlink()


def other_layout(path):
    marker = path.parents[1] / "mixlaunch.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"layout": {"expert": 2, "pipeline": 1}}))


def pickled_code(path):
    torch.save({"model": {"embedding.word_embeddings.weight": Fraction(1, 2)}}, path)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_short, r"mp_rank_00/model_optim_rng.pt: damaged or truncated"),
        (gone, r"mp_rank_00/model_optim_rng.pt: missing"),
        (other_layout, r"mp_rank_00_000/model_optim_rng.pt: missing"),
        (pickled_code, r"mp_rank_00/model_optim_rng.pt: damaged or truncated: .*not a tensor"),
    ],
)
def test_a_bad_legacy_folder_is_refused_by_file(tmp_path, damage, words):
    hub_folders.write(tmp_path / "hub", **SHAPE)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, **OPTIONS)
    damage(tmp_path / "out" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=words):
        run(tmp_path / "out", tmp_path / "back", tmp_path, to="hf")
    assert not list(tmp_path.glob("back*"))


def test_training_says_what_a_legacy_folder_is(tmp_path):
    from megatron_mixtral.checkpoint import save_load

    hub_folders.write(tmp_path / "hub", **SHAPE)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, **OPTIONS)
    with pytest.raises(CheckpointError, match=r"release: legacy files, .*convert again without --layout legacy"):
        save_load.verify(tmp_path / "out" / "release", MixtralShape.from_folder(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"format": "zarr"}, "format: 'zarr' isn't one of torch_dist, legacy"),
        ({"format": "legacy", "names": "mine"}, "names: 'mine' isn't one of te-grouped, te, local"),
        (
            {"format": "legacy", "make_vocab_size_divisible_by": 0},
            "make_vocab_size_divisible_by: 0 must be at least 1",
        ),
    ],
)
def test_a_wrong_option_names_the_valid_ones(tmp_path, config, words):
    hub_folders.write(tmp_path / "hub", **SHAPE)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, **config)
    assert not list(tmp_path.glob("out*"))


def test_layouts_whose_files_would_share_a_name_are_refused():
    with pytest.raises(LayoutError, match=r"expert-tensor 4, tensor 2: .*use expert-tensor 2"):
        legacy.model_ranks(Layout(tensor=2, expert_tensor=4))
    assert len(legacy.model_ranks(Layout(tensor=2, expert_tensor=2, expert=4, pipeline=3))) == 24


def test_several_processes_write_the_same_bytes_and_another_layout_is_another_conversion(tmp_path, monkeypatch):
    import run_job

    hub_folders.write(tmp_path / "hub", **SHAPE)
    config = {"source": str(tmp_path / "hub"), "layout": {"expert": 4}, **OPTIONS}
    run_job.run("convert", config | {"output": str(tmp_path / "two")}, tmp_path / "run", ranks=2)
    run(tmp_path / "hub", tmp_path / "one", tmp_path, layout=Layout(expert=4), **OPTIONS)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    with pytest.raises(InputError, match=r"one: holds another conversion \(other layout\)"):
        run(tmp_path / "hub", tmp_path / "one", tmp_path, layout=Layout(expert=2), **OPTIONS)


def test_archives_beyond_4_gib_open_in_torch_and_in_zipfile(tmp_path):
    """Of 9 tensors of 600 MB, holes but for one number each: such a file takes no room on the disk."""
    count, sizes = 9, (150, 1000, 1000)
    tensors = {f"t{i}": torch_archive.tensor(sizes, "float32", record=i) for i in range(count)}
    pieces, places = torch_archive.around(torch_archive.pickled({"model": tensors}), [4 * 150_000_000] * count)
    with (tmp_path / "big.pt").open("wb") as stream:
        for place, data in pieces:
            stream.seek(place)
            stream.write(data)
        for number, place in enumerate(places):
            stream.seek(place + 4)
            stream.write(struct.pack("<f", number + 1))
    loaded = torch.load(tmp_path / "big.pt", mmap=True, weights_only=True)["model"]
    assert [float(loaded[f"t{i}"][0, 0, 1]) for i in range(count)] == list(range(1, count + 1))
    with zipfile.ZipFile(tmp_path / "big.pt") as archive:
        assert len(archive.infolist()) == count + 3
    value, where = torch_archive.read_archive(tmp_path / "big.pt")
    assert [where(tensor)[1] for tensor in value["model"].values()] == places
