"""Where every row of a hub Mixtral lies in Megatron's checkpoint: one table of links, pure arithmetic, both ways.

Nothing is transposed or computed on the way: each link is a run of whole rows found unchanged on both sides, so a
conversion in either direction is a copy in another order.

`tensors.shapes` has the Megatron side's names and shapes and says in words how they are laid out.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_mixtral.spec.jobs import MixtralShape
from megatron_mixtral.weights.tensors import EXPERTS, LAYER


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start:stop of tensor `name`, in the plane that `index` picks from its leading axes (layer, expert)."""

    name: str
    index: tuple[int, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class RowLink:
    """The same rows, in the hub's files and in Megatron's."""

    hub: Rows
    megatron: Rows


@dataclass(frozen=True, kw_only=True)
class Names:
    """How a hub folder names its experts: `w1/w2/w3` one by one, or fused as transformers 5 holds them."""

    block: str = "block_sparse_moe"
    fused: bool = False

    @classmethod
    def found_in(cls, names: Iterable[str]) -> "Names":
        """The names that a folder with these tensors uses; the hub's own when it says nothing."""
        for name in names:
            if match := re.fullmatch(r"model\.layers\.\d+\.(\w+)\.experts\.(.+)", name):
                return cls(block=match[1], fused=match[2] in ("gate_up_proj", "down_proj"))
        return cls()


def hub_shapes(shape: MixtralShape, names: Names = Names()) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in a hub folder, in the order of the hub's own files."""
    hidden, query, width = shape.hidden_size, shape.num_attention_heads * shape.head_dim, shape.intermediate_size
    key, experts = shape.num_key_value_heads * shape.head_dim, shape.num_local_experts
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for layer in range(shape.num_hidden_layers):
        attention = f"model.layers.{layer}.self_attn"
        block = f"model.layers.{layer}.{names.block}"
        result[f"{attention}.q_proj.weight"] = (query, hidden)
        result[f"{attention}.k_proj.weight"] = (key, hidden)
        result[f"{attention}.v_proj.weight"] = (key, hidden)
        result[f"{attention}.o_proj.weight"] = (hidden, query)
        result[f"{block}.gate.weight"] = (experts, hidden)
        if names.fused:
            result[f"{block}.experts.gate_up_proj"] = (experts, 2 * width, hidden)
            result[f"{block}.experts.down_proj"] = (experts, hidden, width)
        for expert in range(0 if names.fused else experts):
            result[f"{block}.experts.{expert}.w1.weight"] = (width, hidden)
            result[f"{block}.experts.{expert}.w2.weight"] = (hidden, width)
            result[f"{block}.experts.{expert}.w3.weight"] = (width, hidden)
        result[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
        result[f"model.layers.{layer}.post_attention_layernorm.weight"] = (hidden,)
    result["model.norm.weight"] = (hidden,)
    if not shape.tie_word_embeddings:
        result["lm_head.weight"] = (shape.vocab_size, hidden)
    return result


def links(shape: MixtralShape, names: Names = Names()) -> Iterator[RowLink]:
    """Every row of the model once, in the order of Megatron's planes, and of each hub tensor's own rows as well."""
    hidden, vocabulary = shape.hidden_size, shape.vocab_size
    yield whole("model.embed_tokens.weight", "embedding.word_embeddings.weight", (), vocabulary)
    for layer in range(shape.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        norm = f"{LAYER}.self_attention.linear_qkv.layer_norm_weight"
        yield whole(f"{prefix}.input_layernorm.weight", norm, (layer,), hidden)
        yield from _attention(shape, f"{prefix}.self_attn", layer)
        norm = f"{LAYER}.pre_mlp_layernorm.weight"
        yield whole(f"{prefix}.post_attention_layernorm.weight", norm, (layer,), hidden)
        router = f"{LAYER}.mlp.router.weight"
        yield whole(f"{prefix}.{names.block}.gate.weight", router, (layer,), shape.num_local_experts)
        for expert in range(shape.num_local_experts):
            yield from _expert(shape, names, f"{prefix}.{names.block}.experts", layer, expert)
    yield whole("model.norm.weight", "decoder.final_layernorm.weight", (), hidden)
    if not shape.tie_word_embeddings:
        yield whole("lm_head.weight", "output_layer.weight", (), vocabulary)


def whole(hub: str, megatron: str, index: tuple[int, ...], rows: int) -> RowLink:
    """A hub tensor that is one plane of a Megatron tensor as it stands."""
    return RowLink(Rows(hub, (), 0, rows), Rows(megatron, index, 0, rows))


def _attention(shape: MixtralShape, prefix: str, layer: int) -> Iterator[RowLink]:
    """Query, key and value rows, interleaved by query group, then the output projection."""
    head = shape.head_dim
    group = shape.num_attention_heads // shape.num_key_value_heads * head  # query rows of one group
    qkv = f"{LAYER}.self_attention.linear_qkv.weight"
    row = 0
    for number in range(shape.num_key_value_heads):
        for name, rows in (("q_proj", group), ("k_proj", head), ("v_proj", head)):
            hub = Rows(f"{prefix}.{name}.weight", (), number * rows, (number + 1) * rows)
            yield RowLink(hub, Rows(qkv, (layer,), row, row + rows))
            row += rows
    projection = f"{LAYER}.self_attention.linear_proj.weight"
    yield whole(f"{prefix}.o_proj.weight", projection, (layer,), shape.hidden_size)


def _expert(shape: MixtralShape, names: Names, prefix: str, layer: int, expert: int) -> Iterator[RowLink]:
    """Gate (w1) above up (w3) in linear_fc1, down (w2) in linear_fc2."""
    hidden, width = shape.hidden_size, shape.intermediate_size
    if names.fused:
        gate = Rows(f"{prefix}.gate_up_proj", (expert,), 0, width)
        up = Rows(f"{prefix}.gate_up_proj", (expert,), width, 2 * width)
        down = Rows(f"{prefix}.down_proj", (expert,), 0, hidden)
    else:
        gate = Rows(f"{prefix}.{expert}.w1.weight", (), 0, width)
        up = Rows(f"{prefix}.{expert}.w3.weight", (), 0, width)
        down = Rows(f"{prefix}.{expert}.w2.weight", (), 0, hidden)
    yield RowLink(gate, Rows(f"{EXPERTS}.linear_fc1.weight", (layer, expert), 0, width))
    yield RowLink(up, Rows(f"{EXPERTS}.linear_fc1.weight", (layer, expert), width, 2 * width))
    yield RowLink(down, Rows(f"{EXPERTS}.linear_fc2.weight", (layer, expert), 0, hidden))


def megatron_axes(name: str) -> int:
    """How many leading axes of Megatron's tensor `name` pick a plane: layer and expert, layer alone, or none."""
    return 2 if name.startswith(EXPERTS) else 1 if name.startswith(LAYER) else 0


def row_width(shape: tuple[int, ...], axes: int) -> int:
    """Elements in one row of a plane; a norm's row is one element."""
    return shape[axes + 1] if len(shape) > axes + 1 else 1
