"""Loading by rows puts the same bits in the same places as megatron-core's own loader, from either layout."""

import itertools
from pathlib import Path

import pytest
from spawn_ranks import ranks

from megatron_mixtral.jobs import convert
from megatron_mixtral.spec.jobs import ConvertConfig

FUSED = "fused"  # as transformers 5 names experts
LAYOUTS = {
    "pp2": {"pipeline": 2},
    "ep2": {"expert": 2},
    "tp2": {"tensor": 2},
    "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
}


def differences(folder, layouts):
    """At each layout, the parameters that differ from those of megatron-core's loader; and bytes told and there."""
    import torch

    from megatron_mixtral.checkpoint import loading, save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape
    from megatron_mixtral.weights import folder as weights_folder

    loading.BLOCK = 200  # a few rows, so that every tensor takes several reads
    found = {}
    for name, layout in layouts.items():
        for source in sorted(Path(folder).iterdir()):
            weights, layout_now = source / "megatron" / "release", Layout(**layout)
            ranks.initialize(layout_now, timeout=60, seed=5)
            shape = MixtralShape.from_folder(weights)
            part = build.build(shape, layout_now, precision="fp32", random_weights=False)
            save_load.load_weights(part, weights)
            wanted = {key: value.detach().clone() for key, value in part.named_parameters()}
            for path in (source / "hub", weights):
                for parameter in part.parameters():
                    parameter.data.fill_(float("nan"))
                told = []
                loading.load(part, weights_folder.find(path), progress=told.append)
                off = [key for key, value in part.named_parameters() if not torch.equal(value, wanted[key])]
                found[name, source.name, path.name] = (off, sum(told) <= loading.size(part), len(told) > 20)
    ranks.shutdown()
    return found


def differences_in_fp8(folder, layouts):
    """At each layout, the experts that aren't what their own rows become in FP8, or have other scales."""
    import torch

    from megatron_mixtral.checkpoint import loading
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build, fp8
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape
    from megatron_mixtral.weights import folder as weights_folder

    loading.BLOCK = 200
    found = {}
    for (name, layout), path in itertools.product(layouts.items(), ("hub", "megatron")):
        ranks.initialize(Layout(**layout), timeout=60, seed=5)
        weights, parts = weights_folder.find(Path(folder) / "plain" / path), []
        for kept_in_fp8 in (False, True):
            shape = MixtralShape.from_folder(weights)
            options = {"precision": "fp32", "random_weights": False, "fp8_experts": kept_in_fp8}
            parts.append(build.build(shape, Layout(**layout), **options))
            loading.load(parts[-1], weights)
        plain, small = ([layer.mlp.experts for layer in part.decoder.layers] for part in parts)
        off = []
        for number, (wanted, got) in enumerate(zip(plain, small, strict=True)):
            for fc, scale in zip(("linear_fc1", "linear_fc2"), got.scales, strict=True):
                exact, values = getattr(wanted, fc).detach(), getattr(got, fc)
                expected, its_scale = torch.empty_like(values), torch.empty_like(scale)
                fp8.quantize(exact, expected, its_scale)
                same = torch.equal(expected.float(), values.float()) and torch.equal(its_scale, scale)
                off += [] if same and values.dtype == torch.float8_e4m3fn else [(number, fc)]
        found[name, path] = (off, loading.size(parts[1]) < 0.6 * loading.size(parts[0]))
    ranks.shutdown()
    return found


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Hub folders, each with its conversion beside it."""
    import hub_folders

    folder = tmp_path_factory.mktemp("sources")
    kinds = {
        "plain": {"shards": 3, "dtype": "float32"},
        FUSED: {"names": hub_folders.Names(block="mlp", fused=True), "dtype": "bfloat16"},
        "tied": {"tie_word_embeddings": True, "num_hidden_layers": 2},
    }
    for kind, options in kinds.items():
        hub_folders.write(folder / kind / "hub", **options)
        config = ConvertConfig(source=str(folder / kind / "hub"), output=str(folder / kind / "megatron"))
        convert.run(config, folder / kind)
    return folder


def check(found, count):
    assert len(found) == count
    assert {case: result for case, result in found.items() if result != ([], True, True)} == {}


def test_one_process_loads_every_folder(sources):
    check(ranks(1, differences, str(sources), {"alone": {}})[0], 6)


def test_two_ranks_load_their_parts_at_every_layout(sources):
    for found in ranks(2, differences, str(sources), LAYOUTS):
        check(found, 6 * len(LAYOUTS))


def test_experts_become_fp8_as_they_are_loaded(sources):
    layouts = {name: LAYOUTS[name] for name in ("ep2", "tp2_etp2")}
    for found in ranks(2, differences_in_fp8, str(sources), layouts):
        assert len(found) == 4
        assert {case: result for case, result in found.items() if result != ([], True)} == {}
