"""Conversion both ways: bit for bit, through torch's own reader and megatron-core's layouts, by many processes."""

import json
from dataclasses import replace
from itertools import product
from pathlib import Path

import hub_folders
import pytest
import run_job
import torch
import torch.distributed.checkpoint as dcp
from conversion import contents, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_on_ranks import megatron_tensors
from spawn_ranks import ranks

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import tensors
from megatron_mixtral.weights.copying import read_rows
from megatron_mixtral.weights.tensors import Names, Rows, hub_shapes
from megatron_mixtral.weights.torch_dist import TorchDistFolder

NAMES = {"hub": Names(), "transformers 5": Names(block="mlp", fused=True), "fused": Names(fused=True)}


@st.composite
def models(draw):
    groups, experts = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 8))
    return {
        "num_hidden_layers": draw(st.integers(1, 5)),
        "hidden_size": draw(st.sampled_from([8, 24])),
        "intermediate_size": draw(st.sampled_from([1, 12, 16])),
        "num_attention_heads": groups * draw(st.integers(1, 3)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.sampled_from([2, 6])),
        "num_local_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "vocab_size": draw(st.integers(1, 300)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def fitting(data, shape):
    """A layout that the model can be cut by, for the files that only one layout loads."""

    def divisor(name, *numbers):
        return data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if not any(m % n for m in numbers)]), name)

    tensor = divisor("tensor", shape.num_key_value_heads, shape.intermediate_size)
    pipeline = data.draw(st.integers(1, shape.num_hidden_layers), "pipeline")
    expert = divisor("expert", shape.num_local_experts)
    return Layout(tensor=tensor, expert_tensor=tensor, pipeline=pipeline, expert=expert)


@pytest.mark.parametrize("way", ["torch_dist", "legacy"])
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.data(),
    models(),
    st.sampled_from(sorted(NAMES)),
    st.sampled_from(["bfloat16", "float16", "float32"]),
    st.integers(1, 3),
)
def test_there_and_back_is_bit_identical(tmp_path_factory, way, data, model, names, dtype, shards):
    folder = tmp_path_factory.mktemp("model")
    hub_folders.write(folder / "hub", names=NAMES[names], dtype=dtype, shards=shards, **model)
    more = {}
    if way == "legacy":
        more = {"format": way, "layout": fitting(data, MixtralShape.from_folder(folder / "hub"))}
    round_trip(folder, names, **more)


@pytest.mark.parametrize("way", ["torch_dist", "legacy"])
@pytest.mark.parametrize(
    ("model", "names", "dtype", "shards", "layout"),
    [
        ({"num_hidden_layers": 5}, "hub", "bfloat16", 2, Layout(pipeline=4)),
        ({"vocab_size": 32003}, "hub", "float32", 1, Layout(tensor=2, expert_tensor=2)),
        ({"num_local_experts": 4, "num_key_value_heads": 1}, "transformers 5", "float16", 3, Layout(expert=4)),
        ({"head_dim": None, "sliding_window": 9, "tie_word_embeddings": True}, "fused", "bfloat16", 1, Layout()),
    ],
)
def test_shapes_that_are_often_got_wrong_come_back_too(tmp_path, way, model, names, dtype, shards, layout):
    hub_folders.write(tmp_path / "hub", names=NAMES[names], dtype=dtype, shards=shards, **model)
    round_trip(tmp_path, names, format=way, layout=layout)


def round_trip(folder, names, **more):
    run(folder / "hub", folder / "megatron", folder, verify=True, **more)
    run(folder / "megatron", folder / "back", folder, to="hf", verify=True)
    back = hub_folders.read(folder / "back")
    expected = hub_folders.read(folder / "hub")
    if NAMES[names].fused:
        back = fused(back, MixtralShape.from_folder(folder / "hub"), NAMES[names])
    hub_folders.assert_same(back, expected)
    assert (folder / "back" / "config.json").read_bytes() == (folder / "hub" / "config.json").read_bytes()
    assert (folder / "back" / "tokenizer.model").read_bytes() == b"tokenizer"


def fused(given, shape, names):
    """The hub's own tensors, with each layer's experts put together as transformers 5 has them."""
    result = {}
    for name in hub_shapes(shape, names):
        prefix = name.split(".experts.")[0].replace(f".{names.block}", ".block_sparse_moe")
        one_by_one = [
            {w: given.get(f"{prefix}.experts.{e}.{w}.weight") for w in ("w1", "w2", "w3")}
            for e in range(shape.num_local_experts)
        ]
        if name.endswith("gate_up_proj"):
            result[name] = torch.stack([torch.cat([e["w1"], e["w3"]]) for e in one_by_one])
        elif name.endswith("down_proj"):
            result[name] = torch.stack([e["w2"] for e in one_by_one])
        else:
            result[name] = given[name.replace(f".{names.block}.gate", ".block_sparse_moe.gate")]
    return result


def test_torchs_own_reader_finds_every_tensor_where_megatron_has_it(tmp_path):
    names = NAMES["transformers 5"]
    given = hub_folders.write(tmp_path / "hub", names=names, head_dim=6)
    run(tmp_path / "hub", tmp_path / "out", tmp_path)
    shape = MixtralShape.from_folder(tmp_path / "hub")
    found = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in tensors.shapes(shape).items()}
    dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path / "out" / "release"), no_dist=True)
    # This mapping was written apart from the table of links.
    expected = megatron_tensors(given, {**hub_folders.SHAPE, "head_dim": 6})
    hub_folders.assert_same(found, expected)
    metadata = dcp.FileSystemReader(tmp_path / "out" / "release").read_metadata()
    objects = [n for n, grid in tensors.extra_states(shape).items() for _ in range(torch.Size(grid).numel())]
    assert len(metadata.state_dict_metadata) == len(expected) + len(objects)


def layouts_load(folder, layouts):
    """On each rank: whether every part of the model loaded at each layout is the part that it should be."""
    from model_on_ranks import local_part, sharded_tensors

    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout

    shape = MixtralShape.from_folder(Path(folder, "hub"))
    expected = torch.load(Path(folder, "expected.pt"))
    wrong = []
    for layout in layouts:
        ranks.initialize(Layout(**layout), timeout=60)
        built = build.build(shape, Layout(**layout), precision="fp32", random_weights=False)
        save_load.load_weights(built, Path(folder, "megatron", "release"))
        wrong += [
            (layout, t.key) for t in sharded_tensors(built) if not torch.equal(t.data, local_part(t, expected))
        ]
        save_load.save(Path(folder, "_".join(f"{k}{v}" for k, v in layout.items()) or "alone"), built)
    ranks.shutdown()
    return wrong


ON_FOUR = [
    {"pipeline": 4},  # 5 layers: uneven
    {"expert": 2},
    {"tensor": 2, "expert_tensor": 2},  # vocabulary of 67: padded
    {"tensor": 2, "expert": 2},
]


@pytest.fixture(scope="module")
def saved_at_layouts(tmp_path_factory):
    """A folder with hub weights, converted ones, and what a model loaded from those saved at each layout."""
    folder = tmp_path_factory.mktemp("layouts")
    names = NAMES["transformers 5"]
    given = hub_folders.write(folder / "hub", names=names, dtype="float32", num_hidden_layers=5)
    torch.save(
        megatron_tensors(given, {**hub_folders.SHAPE, "num_hidden_layers": 5, "head_dim": 4}),
        folder / "expected.pt",
    )
    run(folder / "hub", folder / "megatron", folder)
    return folder, given, ranks(4, layouts_load, str(folder), ON_FOUR)


def test_every_layout_loads_what_was_converted(saved_at_layouts):
    assert saved_at_layouts[2] == [[]] * 4


@pytest.mark.parametrize("layout", ON_FOUR, ids=lambda layout: "_".join(f"{k}{v}" for k, v in layout.items()))
def test_what_any_layout_saved_comes_back_bit_identical(saved_at_layouts, tmp_path, layout):
    folder, given, _ = saved_at_layouts
    saved = folder / "_".join(f"{k}{v}" for k, v in layout.items())
    (saved / "config.json").write_bytes((folder / "hub" / "config.json").read_bytes())
    run(saved, tmp_path / "back", tmp_path, to="hf")
    shape = MixtralShape.from_folder(folder / "hub")
    back = fused(hub_folders.read(tmp_path / "back"), shape, NAMES["transformers 5"])
    hub_folders.assert_same(back, given)


@pytest.mark.parametrize("to", ["megatron", "hf"])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, to):
    hub_folders.write(tmp_path / "hub", shards=2, hidden_size=64, intermediate_size=512, num_local_experts=8)
    source = tmp_path / "hub"
    if to == "hf":
        run(source, tmp_path / "megatron", tmp_path)
        source = tmp_path / "megatron"
    config = {"source": str(source), "to": to, "max_shard_gb": 0.001}
    run(**config, output=tmp_path / "one", run_dir=tmp_path)
    run_job.run("convert", config | {"output": str(tmp_path / "three")}, tmp_path / "run", ranks=3)
    one = contents(tmp_path / "one")
    assert contents(tmp_path / "three") == one
    assert len([name for name in one if name.endswith((".distcp", ".safetensors"))]) > 3
    assert not list(tmp_path.glob("*.partial"))


def marker(folder):
    path = folder / "release" if (folder / "release").exists() else folder
    return json.loads((path / "mixlaunch.json").read_text())


def test_digests_go_by_the_hubs_names_whatever_the_way(tmp_path):
    hub_folders.write(tmp_path / "hub")
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    there, back = marker(tmp_path / "megatron"), marker(tmp_path / "back")
    assert there["digests"] == back["digests"]
    assert there["digests"].keys() == hub_shapes(MixtralShape.from_folder(tmp_path / "hub")).keys()
    assert (there["kind"], back["kind"]) == ("weights", "hub")
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").read_text() == "release"


def test_the_marker_tells_shape_source_and_revision(tmp_path):
    hub_folders.write(tmp_path / "hub")
    note = tmp_path / "hub" / ".cache" / "huggingface" / "download" / "config.json.metadata"
    note.parent.mkdir(parents=True)
    note.write_text("fc7ac94680e38d7348cfa806e51218e6273104b0\netag\n1700000000\n")
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    told = marker(tmp_path / "megatron")
    assert told["source"] == {"path": str(tmp_path / "hub"), "revision": "fc7ac94680e38d7348cfa806e51218e6273104b0"}
    assert MixtralShape(**told["shape"]) == MixtralShape.from_folder(tmp_path / "hub")
    assert told["dtype"] == "bfloat16"
    snapshot = tmp_path / "models--m" / "snapshots" / "0123abcd"  # huggingface_hub's cache
    hub_folders.write(snapshot)
    run(snapshot, tmp_path / "other", tmp_path)
    assert marker(tmp_path / "other")["source"]["revision"] == "0123abcd"


@pytest.mark.parametrize(
    ("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16"), ("float32", "float16")]
)
def test_another_type_is_rounded_as_torch_rounds(tmp_path, stored, asked):
    given = hub_folders.write(tmp_path / "hub", dtype=stored)
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path, dtype=asked, verify=True)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    hub_folders.assert_same(
        hub_folders.read(tmp_path / "back"), {n: t.to(getattr(torch, asked)) for n, t in given.items()}
    )
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == asked
    run(tmp_path / "megatron", tmp_path / "again", tmp_path, to="hf", dtype=stored)
    again = {n: t.to(getattr(torch, asked)).to(getattr(torch, stored)) for n, t in given.items()}
    hub_folders.assert_same(hub_folders.read(tmp_path / "again"), again)


def test_values_that_float16_cannot_hold_are_refused(tmp_path):
    given = hub_folders.write(tmp_path / "hub", dtype="float32")
    given["model.norm.weight"][3] = 70000.0
    hub_folders.write_shards(tmp_path / "hub", given, 1)
    with pytest.raises(
        InputError, match=r"hub/model.safetensors: tensor model\.norm\.weight: has values beyond 65504"
    ):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, dtype="float16")
    assert not (tmp_path / "out").exists()


def test_values_that_bfloat16_cannot_hold_are_refused(tmp_path):
    given = hub_folders.write(tmp_path / "hub", dtype="float32")
    given["model.norm.weight"][3] = 3.4e38  # finite, and rounded up it isn't
    hub_folders.write_shards(tmp_path / "hub", given, 1)
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight: has values beyond 3\.38953e\+38"):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, dtype="bfloat16")


def test_what_a_config_leaves_out_is_what_transformers_takes():
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "num_attention_heads": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"model_type": "mixtral", "num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 67}
    for more in (
        {},
        {"tie_word_embeddings": None, "rms_norm_eps": None, "max_position_embeddings": None},
        {"rope_theta": 5.0, "rope_scaling": None},
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "default"}},
    ):
        found = MixtralShape.from_hf(sizes | more)
        theirs = MixtralConfig(**{k: v for k, v in (sizes | more).items() if v is not None})
        assert found.rope_theta == theirs.rope_parameters["rope_theta"]
        assert (found.num_key_value_heads, found.rms_norm_eps) == (theirs.num_key_value_heads, theirs.rms_norm_eps)
        assert found.tie_word_embeddings is theirs.tie_word_embeddings
    assert (
        MixtralShape.from_hf(sizes | {"num_key_value_heads": None}).num_key_value_heads == 16
    )  # as the hub means it


def test_of_a_single_file_and_an_index_the_file_is_read_as_transformers_does(tmp_path):
    hub_folders.write(tmp_path / "hub", shards=2)
    given = hub_folders.write(tmp_path / "other", seed=1)
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "hub" / "model.safetensors")
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    hub_folders.assert_same(hub_folders.read(tmp_path / "back"), given)


def test_tokens_that_a_finetune_added_go_along(tmp_path):
    hub_folders.write(tmp_path / "hub")
    (tmp_path / "hub" / "added_tokens.json").write_text('{"<|im_start|>": 66}')
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    assert json.loads((tmp_path / "back" / "added_tokens.json").read_text()) == {"<|im_start|>": 66}


def test_of_many_chunks_only_those_of_the_plane_are_looked_at(tmp_path):
    """A model of thousands of experts took hours when each read searched all chunks."""
    hub_folders.write(tmp_path / "hub", num_local_experts=9)
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    folder = TorchDistFolder(tmp_path / "megatron" / "release")
    name = f"{tensors.EXPERTS}.linear_fc1.weight"

    class Chunks(list):
        looks = 0

        def __iter__(self):
            Chunks.looks += 1
            return super().__iter__()

    folder.tensors[name] = replace(folder.tensors[name], chunks=Chunks(folder.tensors[name].chunks))
    for layer, expert in product(range(3), range(9)):
        read_rows(folder, Rows(name, (layer, expert), 20, 30))  # of gate and up
        folder.file_of(Rows(name, (layer, expert), 20, 30))
    assert Chunks.looks == 1


def test_nan_passes_unless_it_is_asked_for(tmp_path):
    given = hub_folders.write(tmp_path / "hub")
    given["model.layers.1.block_sparse_moe.experts.2.w3.weight"][3, 4] = float("nan")
    hub_folders.write_shards(tmp_path / "hub", given, 1)
    words = r"hub/model.safetensors: tensor \S+\.1\.block_sparse_moe\.experts\.2\.w3\.weight: holds NaN"
    with pytest.raises(InputError, match=words):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, check_finite=True)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "hub", tmp_path / "other", tmp_path, check_finite=False)
    with pytest.raises(
        InputError, match=r"other/release/__\d_0.distcp: tensor \S+experts.linear_fc1.weight: holds NaN"
    ):
        run(tmp_path / "other", tmp_path / "back", tmp_path, to="hf", check_finite=True)
    assert not (tmp_path / "back").exists()


def test_mixed_types_that_share_no_tensor_stay_as_they_are(tmp_path):
    given = hub_folders.write(tmp_path / "hub")
    for name in given:
        if "gate" in name or "norm" in name:
            given[name] = given[name].float()
    hub_folders.write_shards(tmp_path / "hub", given, 2)
    (tmp_path / "hub" / "model.safetensors").unlink()
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    hub_folders.assert_same(hub_folders.read(tmp_path / "back"), given)


def test_mixed_types_within_one_tensor_ask_for_dtype(tmp_path):
    given = hub_folders.write(tmp_path / "hub")
    name = "model.layers.2.self_attn.k_proj.weight"
    given[name] = given[name].float()
    hub_folders.write_shards(tmp_path / "hub", given, 1)
    with pytest.raises(InputError, match=r"q_proj.* is bfloat16, .*layers\.2.*k_proj.* is float32.*--dtype"):
        run(tmp_path / "hub", tmp_path / "out", tmp_path)


def test_a_tied_model_may_store_its_output_layer_if_it_is_the_embedding(tmp_path):
    given = hub_folders.write(tmp_path / "hub", tie_word_embeddings=True)
    doubled = {**given, "lm_head.weight": given["model.embed_tokens.weight"].clone()}
    hub_folders.write_shards(tmp_path / "hub", doubled, 1)
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path)
    run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf")
    hub_folders.assert_same(hub_folders.read(tmp_path / "back"), given)
    doubled["lm_head.weight"][5] += 1
    hub_folders.write_shards(tmp_path / "hub", doubled, 1)
    with pytest.raises(InputError, match=r"ties lm_head\.weight to model\.embed_tokens\.weight"):
        run(tmp_path / "hub", tmp_path / "other", tmp_path)
