"""The smallest Mixtral that trains, with data, and what is in a checkpoint of it; `world` in conftest is one."""

import json

SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
EP2_PP2 = {"expert": 2, "pipeline": 2}


def make_weights(folder, poison="", value=float("nan")):
    """A release of random weights; `poison` names a parameter to fill with `value`."""
    import torch

    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape

    ranks.initialize(Layout(), seed=5)
    built = build.build(MixtralShape.from_folder(folder), Layout(), precision="fp32")
    for name, parameter in built.named_parameters():
        if poison and poison in name:
            torch.nn.init.constant_(parameter, value)
    save_load.save(folder / "release", built, assets=folder)


def make_world(folder, **changes):
    """A converted model, and data in which each token tells the next: cycles of 64 tokens with varying strides."""
    import numpy as np
    from spawn_ranks import ranks

    from megatron_mixtral.data import indexed

    (folder / "config.json").write_text(json.dumps(SHAPE | changes))
    ranks(1, make_weights, folder)
    random = np.random.default_rng(1)
    lengths = random.integers(40, 200, size=60).astype(np.int32)
    tokens = [(np.arange(n) * 5 + random.integers(64)) % 64 for n in lengths]
    np.concatenate(tokens).astype(np.uint16).tofile(folder / "data.bin")
    indexed.write_index(folder / "data.idx", lengths, np.dtype(np.uint16))
    return folder


def training(world, **more):
    """Eight steps of `finetune` in it."""
    return {
        "model": str(world),
        "data": str(world / "data"),
        "steps": 8,
        "sequence_length": 32,
        "micro_batch": 2,
        "global_batch": 8,
        "precision": "fp32",
        "warmup_steps": 2,
        "validation": 0.1,
        **more,
    }


def tensors_of(folder):
    """Every tensor of a training checkpoint, optimizer and all, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state = {}
    _load_state_dict(
        state, storage_reader=FileSystemReader(folder), planner=_EmptyStateDictLoadPlanner(), no_dist=True
    )
    return {name: value for name, value in state.items() if hasattr(value, "shape")}
