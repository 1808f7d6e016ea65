"""The Megatron model against transformers' MixtralForCausalLM, in fp32, on real process groups."""

import json
from pathlib import Path

import pytest
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


def megatron_tensors(given, config):
    """HF's tensors by the name and shape they have in a Megatron checkpoint; written apart from weights.py."""
    import torch

    layers, groups = range(config["num_hidden_layers"]), config["num_key_value_heads"]
    heads, size = config["num_attention_heads"] // groups, config["head_dim"]
    given = {name.removeprefix("model."): tensor.detach() for name, tensor in given.items()}

    def each(name):
        return torch.stack([given[f"layers.{layer}.{name}"] for layer in layers])

    def by_group(name, count):
        return each(f"self_attn.{name}.weight").view(len(layers), groups, count * size, -1)

    qkv = torch.cat([by_group("q_proj", heads), by_group("k_proj", 1), by_group("v_proj", 1)], dim=2)
    decoder = "decoder.layers."
    tied = {} if config.get("tie_word_embeddings") else {"output_layer.weight": given["lm_head.weight"]}
    return tied | {
        "embedding.word_embeddings.weight": given["embed_tokens.weight"],
        decoder + "self_attention.linear_qkv.layer_norm_weight": each("input_layernorm.weight"),
        decoder + "self_attention.linear_qkv.weight": qkv.flatten(1, 2),
        decoder + "self_attention.linear_proj.weight": each("self_attn.o_proj.weight"),
        decoder + "pre_mlp_layernorm.weight": each("post_attention_layernorm.weight"),
        decoder + "mlp.router.weight": each("mlp.gate.weight"),
        decoder + "mlp.experts.experts.linear_fc1.weight": each("mlp.experts.gate_up_proj"),
        decoder + "mlp.experts.experts.linear_fc2.weight": each("mlp.experts.down_proj"),
        "decoder.final_layernorm.weight": given["norm.weight"],
    }


def start(folder, layout, **options):
    """Join the ranks and build the model of `folder` at `layout`."""
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.jobs import Layout, MixtralShape

    layout, shape = Layout(**layout), MixtralShape.from_folder(Path(folder))
    ranks.initialize(layout, timeout=60)
    return build.build(shape, layout, precision="fp32", **options)


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


def sharded_tensors(model):
    """What the model would save, split as it would be."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = model.sharded_state_dict()
    apply_factories(state)
    return [value for value in nested_values(state) if isinstance(value, ShardedTensor)]


def local_part(tensor, everything):
    """The part of the global tensor that this shard holds; zeros beyond its edge."""
    import torch

    whole = everything[tensor.key]
    front = whole[tensor.global_offset[: tensor.prepend_axis_num]]
    offset = tensor.global_offset[tensor.prepend_axis_num :]
    part = front[tuple(slice(o, o + n) for o, n in zip(offset, tensor.local_shape, strict=True))]
    padded = torch.zeros(tensor.local_shape, dtype=part.dtype)
    padded[tuple(slice(0, n) for n in part.shape)] = part
    return padded


def run_pipeline(model, tokens, result, *, forward_only):
    """`result` ("losses" [B, S-1] or "logits" [B, S-1, V]) by megatron-core's schedule; on the last stage only."""
    import torch

    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    batches = tokens.chunk(2)
    positions = torch.arange(tokens.shape[1] - 1).expand(len(batches[0]), -1)

    def finish(output):
        kept = output if result == "losses" else gather_from_tensor_model_parallel_region(output)
        return output.mean(), {"kept": kept.detach()}

    def step(iterator, chunk):
        ids = next(iterator)
        labels = {"labels": ids[:, 1:].contiguous()} if result == "losses" else {}
        return chunk(ids[:, :-1].contiguous(), positions, None, **labels), finish

    parts = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=tokens.shape[1] - 1,
        micro_batch_size=len(batches[0]),
        forward_only=forward_only,
    )
    return torch.cat([part["kept"] for part in parts]) if parts else None


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
