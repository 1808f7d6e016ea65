"""Hub folders with random weights of any shape, and their tensors read back by safetensors' own library."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.tensors import Names, hub_shapes

SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 3,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 67,
}


HUB = Names()


def write(folder: Path, *, names: Names = HUB, dtype: str = "bfloat16", shards: int = 1, seed: int = 0, **changes):
    """`folder` in the hub's layout; returns its tensors."""
    folder.mkdir(parents=True)
    config = {**SHAPE, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"tokenizer")
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(getattr(torch, dtype))
        for name, shape in hub_shapes(MixtralShape.from_hf(config), names).items()
    }
    write_shards(folder, tensors, shards)
    return tensors


def write_shards(folder: Path, tensors, shards: int) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::shards]}
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read(folder: Path):
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as shard:
            tensors |= {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
    return tensors


def assert_same(one, other) -> None:
    """Same names, types and bits."""
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name
