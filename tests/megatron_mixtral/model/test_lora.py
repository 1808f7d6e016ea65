"""Adapters: PEFT and transformers compute what we do, at every layout; a base is told from any other."""

import json
import shutil
from pathlib import Path

import pytest
import small_world
from spawn_ranks import ranks

from megatron_mixtral.errors import CheckpointError, InputError
from megatron_mixtral.jobs import convert, verify
from megatron_mixtral.spec.jobs import ConvertConfig, VerifyConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights import merged as merging
from megatron_mixtral.weights.lora import Lora

SHAPE = small_world.SHAPE | {"head_dim": 16, "initializer_range": 0.1}  # head_dim isn't hidden_size / heads
ADAPTED = {
    "attention": Lora(rank=4, alpha=6),  # a scale that isn't whole
    "experts": Lora(rank=2, alpha=5, experts=True),
}
TOLERANCE = 1e-5
LAYOUTS = {
    "pp2": {"pipeline": 2},
    "ep2": {"expert": 2},
    "etp2": {"expert_tensor": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
}


# --- on ranks -----------------------------------------------------------------------------------------------------


def make_world(folder, made):
    """Random weights as `base`, `other` and, in bf16, `half`; adapters on them, and what is then computed."""

    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape
    from megatron_mixtral.weights import merged as merging

    folder = Path(folder)
    shape = MixtralShape.from_folder(folder)
    for name, precision, seed in (("base", "fp32", 5), ("other", "fp32", 6), ("half", "bf16", 5)):
        ranks.initialize(Layout(), seed=seed)
        save_load.save(folder / name / "release", build.build(shape, Layout(), precision=precision), assets=folder)
    for name, lora in made.items():
        for base, precision in (("base", "fp32"), ("half", "bf16")):
            built = build.build(shape, Layout(), precision=precision, lora=lora)
            save_load.load_weights(built, folder / base / "release")
            built.base = merging.describe_base(folder / base / "release", shape)
            randomize(built)
            save_load.save(folder / f"{name}_{base}" / "release", built, assets=folder)
            if precision == "fp32":
                write_expected(built, folder / f"{name}.pt")
    ranks.shutdown()


def randomize(built):
    import torch

    torch.manual_seed(11)
    for parameter in built.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)


def write_expected(built, path):
    """Adapters, logits and gradients of a model on one rank."""
    import torch

    tokens = torch.randint(0, built.vocab_size, (4, 25), generator=torch.Generator().manual_seed(3))
    ids, positions = tokens[:, :-1], torch.arange(24).expand(4, -1)
    values = whole_adapters(built)
    with torch.no_grad():
        logits = built(ids, positions, None)
    built(ids, positions, None, labels=tokens[:, 1:].contiguous()).mean().backward()
    for parameter in (p for p in built.parameters() if p.requires_grad):
        parameter.data.copy_(parameter.grad)
    gradients = whole_adapters(built)
    torch.save({"tokens": tokens, "logits": logits, "adapters": values, "gradients": gradients}, path)


def shards_of_adapters(built):
    from model_on_ranks import sharded_tensors

    return [shard for shard in sharded_tensors(built) if adapters.is_adapter(shard.key)]


def whole_adapters(built):
    """Name in a checkpoint -> the tensor, all of which is on this one rank."""
    import torch

    whole = {}
    for shard in shards_of_adapters(built):
        into = whole.setdefault(shard.key, torch.zeros(shard.global_shape))
        into[shard.global_offset[: shard.prepend_axis_num]] = shard.data.detach()
    return whole


def compare(folder, name, layout):
    """How far off a model with adapters is at `layout`, and one into which they were merged while it loaded."""
    import torch
    from model_on_ranks import local_part, run_pipeline, start

    from megatron_mixtral.checkpoint import loading, save_load

    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    expected, off = torch.load(Path(folder) / f"{name}.pt"), {}
    built = start(folder, layout, random_weights=False, lora=ADAPTED[name])
    save_load.load_weights(built, Path(folder) / "base" / "release")
    for shard in shards_of_adapters(built):
        shard.data.detach().copy_(local_part(shard, expected["adapters"]))
    wrapped = DistributedDataParallel(built.config, DistributedDataParallelConfig(), built)
    built.config.finalize_model_grads_func = finalize_model_grads
    off["logits"] = difference(run_pipeline(wrapped, expected["tokens"], "logits", forward_only=True), expected)
    run_pipeline(wrapped, expected["tokens"], "losses", forward_only=False)
    for parameter in (p for p in built.parameters() if p.requires_grad):
        parameter.data.copy_(parameter.main_grad)
    for shard in shards_of_adapters(built):
        wanted = local_part(shard, expected["gradients"])
        error = (shard.data - wanted).abs().max() / expected["gradients"][shard.key].abs().max()
        off[shard.key] = max(off.get(shard.key, 0.0), float(error))
    merged = start(folder, layout, random_weights=False)
    loading.load(merged, Path(folder) / f"{name}_base" / "release")
    off["merged"] = difference(run_pipeline(merged, expected["tokens"], "logits", forward_only=True), expected)
    return off


def difference(logits, expected):
    if logits is None:  # another stage has them
        return 0.0
    wanted = expected["logits"]
    return float((logits[..., : wanted.shape[-1]] - wanted).abs().max())


def on_two_ranks(folder, layouts):
    from megatron_mixtral.mcore import ranks

    off = {name: compare(folder, "experts", layout) for name, layout in layouts.items()}
    ranks.shutdown()
    return off


# --- what they compute --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    ranks(1, make_world, str(folder), ADAPTED)
    return folder


def converted(source, output, to, **more):
    convert.run(ConvertConfig(source=str(source), output=str(output), to=to, **more), output.parent)
    return output


@pytest.mark.parametrize("name", ADAPTED)
def test_peft_and_the_merged_export_compute_what_the_model_does(world, tmp_path, name):
    import torch
    from peft import PeftModel
    from transformers import MixtralForCausalLM

    base = converted(world / "base", tmp_path / "base", "hf")
    merged = converted(world / f"{name}_base", tmp_path / "merged", "hf")
    alone = converted(world / f"{name}_base", tmp_path / "peft", "peft", base=str(base))
    expected = torch.load(world / f"{name}.pt")
    ids, wanted = expected["tokens"][:, :-1], expected["logits"]
    with torch.no_grad():
        plain = MixtralForCausalLM.from_pretrained(base, dtype=torch.float32)
        assert (plain(ids).logits - wanted).abs().max() > 0.1, "the adapters must matter"
        whole = MixtralForCausalLM.from_pretrained(merged, dtype=torch.float32)
        assert (whole(ids).logits - wanted).abs().max() < TOLERANCE
        assert (PeftModel.from_pretrained(plain, alone)(ids).logits - wanted).abs().max() < TOLERANCE
        # transformers finds the base by the adapter's own word
        found = MixtralForCausalLM.from_pretrained(alone, dtype=torch.float32)
        assert (found(ids).logits - wanted).abs().max() < TOLERANCE


def test_adapters_alone_are_proven_too(world, tmp_path):
    alone = converted(world / "experts_base", tmp_path / "peft", "peft")
    verify.run(VerifyConfig(folder=str(alone)), tmp_path)
    for name, words in (("adapter_model.safetensors", "lora_B.weight: not"), ("adapter_config.json", "written")):
        data = (alone / name).read_bytes()
        (alone / name).write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        with pytest.raises(CheckpointError, match=rf"{name}: .*{words}"):
            verify.run(VerifyConfig(folder=str(alone)), tmp_path)
        (alone / name).write_bytes(data)


@pytest.mark.parametrize("name", ADAPTED)
@pytest.mark.parametrize("base", ["base", "half"])
def test_merging_is_w_plus_scaled_b_a_in_fp32_bit_for_bit(world, tmp_path, name, base):
    import hub_folders
    import torch

    before = hub_folders.read(converted(world / base, tmp_path / "base", "hf"))
    after = hub_folders.read(converted(world / f"{name}_{base}", tmp_path / "merged", "hf"))
    alone = hub_folders.read(converted(world / f"{name}_{base}", tmp_path / "peft", "peft"))
    lora, changed = ADAPTED[name], 0

    def update(place, expert=None):
        a, b = (alone[f"base_model.model.{place}.{side}.weight"].float() for side in ("lora_A", "lora_B"))
        if expert is not None:  # as PEFT's documentation has them: rank rows an expert, and every E-th column
            a = a.view(SHAPE["num_local_experts"], lora.rank, -1)[expert]
            b = b.view(-1, lora.rank, SHAPE["num_local_experts"])[:, :, expert]
        return lora.alpha / lora.rank * (b @ a)

    for tensor, old in before.items():
        parts, new = tensor.split("."), old
        layer = ".".join(parts[:3])
        if parts[-2] in ("q_proj", "k_proj", "v_proj", "o_proj"):
            new = old.float() + update(".".join(parts[:-1]))
        elif lora.experts and "experts" in parts:
            expert, matrix = int(parts[-3]), parts[-2]
            if matrix == "w2":
                new = old.float() + update(f"{layer}.mlp.experts", expert)
            else:
                both = update(f"{layer}.mlp.experts.base_layer", expert)
                new = old.float() + both.chunk(2)[matrix == "w3"]
        changed += new is not old
        assert torch.equal(new.to(old.dtype), after[tensor]), tensor
    assert changed == SHAPE["num_hidden_layers"] * (4 + 3 * SHAPE["num_local_experts"] * lora.experts)


def test_every_layout_computes_the_same_logits_and_gradients(world):
    for off in ranks(2, on_two_ranks, str(world), LAYOUTS):
        for layout, errors in off.items():
            assert max(errors.values()) < TOLERANCE, (layout, errors)
            assert len(errors) == 2 + 2 * 6, "logits twice, and six pairs of gradients"


def test_a_checkpoint_of_adapters_is_small_and_says_whose_it_is(world):
    shape = MixtralShape.from_folder(world)
    for name, lora in ADAPTED.items():
        folder = weights_folder.resolve(world / f"{name}_base")
        marker = weights_folder.read_marker(folder)
        assert marker["kind"] == "adapter"
        assert adapters.described(marker, folder) == lora
        assert marker["base"]["path"] == str(world / "base/release")
        assert set(merging.Adapters(folder, shape, lora).source.tensors) == set(adapters.shapes(shape, lora))


def test_another_base_is_refused_by_name(world, tmp_path):
    run = world / "attention_base"
    for other in ("other", "half"):
        with pytest.raises(CheckpointError, match=f"{other}/release: isn't the base of the adapters in {run}"):
            converted(run, tmp_path / "out", "hf", base=str(world / other))
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        converted(run, tmp_path / "out", "hf", base=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="holds weights, not adapters"):
        converted(world / "base", tmp_path / "out", "peft")
    shape = MixtralShape.from_folder(world)
    with pytest.raises(CheckpointError, match="adapters on top of adapters"):
        merging.describe_base(run / "release", shape)
    assert not (tmp_path / "out").exists()


def test_a_run_whose_base_became_another_doesnt_go_on(world, tmp_path):
    shape, lora = MixtralShape.from_folder(world), ADAPTED["attention"]
    shutil.copytree(world, tmp_path / "copy")
    run = tmp_path / "copy/attention_base/release"
    (run / "mixlaunch.json").write_text((run / "mixlaunch.json").read_text().replace(str(world), "/gone"))
    found = merging.base_of_run(run, lora, tmp_path / "copy/base", shape)  # asked second, after what is recorded
    assert found["path"] == str(tmp_path / "copy/base/release")
    with pytest.raises(CheckpointError, match="other/release: isn't the base of the adapters"):
        merging.base_of_run(run, lora, tmp_path / "copy/other", shape)
    with pytest.raises(CheckpointError, match=r"trained adapters of attention, rank 4, .* can't .* rank 2"):
        merging.base_of_run(run, ADAPTED["experts"], tmp_path / "copy/base", shape)


def test_a_base_may_move_and_may_be_the_hubs(world, tmp_path):
    import hub_folders

    shutil.copytree(world, tmp_path / "copy")
    marker_file = tmp_path / "copy/attention_base/release/mixlaunch.json"
    marker_file.write_text(marker_file.read_text().replace(str(world), "/gone"))
    with pytest.raises(CheckpointError, match=r"adapters of /gone/base/release.*--base DIR says where"):
        converted(tmp_path / "copy/attention_base", tmp_path / "none", "hf")
    wanted = hub_folders.read(converted(world / "attention_base", tmp_path / "wanted", "hf"))
    hub = converted(world / "base", tmp_path / "hub", "hf")
    for number, base in enumerate((tmp_path / "copy/base", hub)):
        found = converted(tmp_path / "copy/attention_base", tmp_path / f"found_{number}", "hf", base=str(base))
        hub_folders.assert_same(hub_folders.read(found), wanted)
