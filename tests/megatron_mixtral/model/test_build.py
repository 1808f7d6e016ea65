"""The Megatron model against transformers' MixtralForCausalLM, in fp32, on real process groups."""

import json
from pathlib import Path

import pytest
from model_on_ranks import local_part, megatron_tensors, run_pipeline, sharded_tensors, start
from spawn_ranks import ranks

SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,  # not hidden_size / heads
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 131,  # odd, so that tensor parallelism must pad it
    "max_position_embeddings": 512,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
TOLERANCE = 1e-4


def make_reference(folder, **changes):
    """A random HF model's tensors under Megatron's names, with its logits, losses and gradients, in `folder`."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = {**SHAPE, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(7)
    kept = {k: v for k, v in config.items() if k not in ("model_type", "rope_theta")}
    model = MixtralForCausalLM(
        MixtralConfig(
            **kept,
            rope_parameters={"rope_type": "default", "rope_theta": config["rope_theta"]},
            initializer_range=0.2,
            output_router_logits=False,
        )
    )
    model.eval()
    tokens = torch.randint(
        0, config["vocab_size"], (4, 25)
    )  # one more than a multiple of 2, as tensor parallelism needs
    logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    ).view(4, -1)
    losses.mean().backward()
    weights = megatron_tensors(dict(model.named_parameters()), config)
    gradients = megatron_tensors({n: p.grad for n, p in model.named_parameters()}, config)
    torch.save(
        {"tokens": tokens, "logits": logits.detach(), "losses": losses.detach(), "gradients": gradients},
        folder / "expected.pt",
    )
    torch.save(weights, folder / "weights.pt")
    return folder


def write_weights(folder):
    """The reference's tensors into `folder/release`, by way of a model of one rank."""
    import torch

    from megatron_mixtral.checkpoint import save_load

    model = start(folder, {})
    weights = torch.load(Path(folder) / "weights.pt")
    with torch.no_grad():
        for tensor in sharded_tensors(model):
            tensor.data.copy_(local_part(tensor, weights))
    save_load.save(Path(folder) / "release", model, assets=Path(folder))


def compare(folder, layout):
    """This rank's logits, losses and gradients against the reference's: by how much each differs at most."""
    import torch

    from megatron_mixtral.checkpoint import save_load

    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    expected = torch.load(Path(folder) / "expected.pt")
    model = start(folder, layout, random_weights=False)
    save_load.load_weights(model, Path(folder) / "release")
    off = {}
    logits = run_pipeline(model, expected["tokens"], "logits", forward_only=True)
    if logits is not None:
        wanted = expected["logits"][:, :-1]
        off["logits"] = float((logits[..., : wanted.shape[-1]] - wanted).abs().max())
    if model.pre_process and model.post_process:  # as engines ask for them
        ids = expected["tokens"][:, :-1].contiguous()
        with torch.no_grad():
            logits = model(ids, torch.arange(ids.shape[1]).expand_as(ids), None, runtime_gather_output=True)
        off["gathered logits"] = float((logits[..., : wanted.shape[-1]] - wanted).abs().max())
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    model.config.finalize_model_grads_func = finalize_model_grads
    losses = run_pipeline(wrapped, expected["tokens"], "losses", forward_only=False)
    if losses is not None:
        off["losses"] = float((losses - expected["losses"]).abs().max())
    return off | gradient_errors(model, expected["gradients"])


def gradient_errors(model, expected):
    """Largest difference relative to the largest entry, for each tensor that this rank holds a part of."""
    off = {}
    for parameter in model.parameters():
        parameter.data.copy_(parameter.main_grad)  # so that the sharded view shows gradients
    for tensor in sharded_tensors(model):
        wanted = local_part(tensor, expected)
        # Of a router that picks one expert the gradient is 0 but for rounding.
        error = (tensor.data - wanted).abs().max() / expected[tensor.key].abs().max().clamp(min=1e-3)
        off[tensor.key] = max(off.get(tensor.key, 0.0), float(error))
    return off


def on_one_rank(folders):
    """Write the weights of every shape, and compare those of the first."""
    from megatron_mixtral.mcore import ranks

    for folder in folders:
        write_weights(folder)
    off = compare(folders[0], {})
    ranks.shutdown()
    return off


def on_two_ranks(cases):
    """One layout after another over the same ranks: name -> differences."""
    from megatron_mixtral.mcore import ranks

    off = {name: compare(folder, layout) for name, folder, layout in cases}
    ranks.shutdown()
    return off


LAYOUTS = {
    "pp2": {"pipeline": 2},
    "ep2": {"expert": 2},
    "tp2": {"tensor": 2},
    "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
    "tp2_ep2": {"tensor": 2, "expert": 2},
}
SHAPES = {
    "uneven_stages": {"num_hidden_layers": 3},
    "tied": {"tie_word_embeddings": True},
    "window": {"sliding_window": 7},
    "no_groups": {"num_key_value_heads": 8},
    "top3_of_4": {"num_local_experts": 4, "num_experts_per_tok": 3},
    "top1": {"num_experts_per_tok": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    names = {"reference": {}, **SHAPES}
    return {name: str(make_reference(tmp_path_factory.mktemp(name), **names[name])) for name in names}


@pytest.fixture(scope="module")
def alone(folders):
    return ranks(1, on_one_rank, list(folders.values()))


@pytest.fixture(scope="module")
def in_two(folders, alone):
    cases = [(name, folders["reference"], layout) for name, layout in LAYOUTS.items()]
    cases += [(name, folders[name], LAYOUTS["pp2"]) for name in SHAPES]
    return ranks(2, on_two_ranks, cases)


def check(parts):
    """Every rank near the reference, and together they held every tensor."""
    for off in parts:
        assert max(off.values()) < TOLERANCE, off
    held = {name for off in parts for name in off}
    assert {"logits", "losses", "embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} < held
    assert len([name for name in held if name.startswith("decoder.layers.")]) == 7


def test_one_process_computes_what_transformers_does(alone):
    check(alone)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_compute_what_transformers_does(in_two, layout):
    check([off[layout] for off in in_two])


@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_do_too_in_two_stages(in_two, shape):
    check([off[shape] for off in in_two])
