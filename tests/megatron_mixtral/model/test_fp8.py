"""FP8 is refused, with what it lacks, where it can't be had; where it can, megatron-core is told to use it."""

import pytest

from megatron_mixtral.errors import InputError
from megatron_mixtral.mcore import compat, cpu
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.training import megatron_options


@pytest.fixture
def card(monkeypatch):
    """Pretend Transformer Engine and a GPU of some name and compute capability."""
    import torch

    def pretend(name="H100", capability=(9, 0), engine=True):
        monkeypatch.setattr(compat, "have_transformer_engine", lambda: engine)
        monkeypatch.setattr(cpu, "HAVE_GPU", bool(name))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return pretend


def config(**more):
    return FinetuneConfig(model="", data="", **{"fp8": "hybrid", **more})


@pytest.mark.parametrize(
    ("there", "asked", "words"),
    [
        ({"engine": False}, {}, "needs Transformer Engine, which isn't installed where the job runs"),
        ({"name": ""}, {}, "needs a GPU"),
        ({"name": "A100", "capability": (8, 0)}, {}, "A100 has compute capability 8.0; recipe delayed needs 8.9"),
        ({"name": "L40", "capability": (8, 9)}, {"fp8_recipe": "blockwise"}, "recipe blockwise needs 9.0 or newer"),
        ({}, {"fp8_recipe": "mxfp8"}, "H100 has compute capability 9.0; recipe mxfp8 needs 10.0 or newer"),
        ({}, {"precision": "fp32"}, "needs precision bf16"),
        ({}, {"lora": 8}, "remove lora"),
        ({}, {"fp8": "e5m2"}, "isn't one of none, hybrid, e4m3"),
        ({}, {"fp8_recipe": "best"}, "isn't one of delayed, tensorwise, blockwise, mxfp8"),
    ],
)
def test_what_fp8_lacks_is_said(card, there, asked, words):
    card(**there)
    with pytest.raises(InputError) as caught:
        megatron_options.check(config(**asked))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("there", "kind", "recipe"),
    [
        ({}, "hybrid", "delayed"),
        ({"name": "L40", "capability": (8, 9)}, "e4m3", "tensorwise"),
        ({"name": "B200", "capability": (10, 0)}, "e4m3", "mxfp8"),
    ],
)
def test_megatron_core_is_told_to_use_it(card, monkeypatch, there, kind, recipe):
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout

    from megatron.core.transformer import transformer_config

    card(**there)
    monkeypatch.setattr(transformer_config, "is_te_min_version", lambda *_, **__: True)
    asked = config(fp8=kind, fp8_recipe=recipe)
    megatron_options.check(asked)
    shape = MixtralShape(
        num_hidden_layers=2,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=64,
    )
    built = build.transformer_config(
        shape, Layout(), precision="bf16", aux_loss=0.01, **megatron_options.model_options(asked, shape)
    )
    assert (built.fp8, built.fp8_recipe) == (kind, recipe)
    plain = build.transformer_config(shape, Layout(), precision="bf16", aux_loss=0.01)
    assert plain.fp8 is None
