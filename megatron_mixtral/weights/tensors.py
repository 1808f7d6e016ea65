"""The tensors of a Mixtral: names and global shapes in Megatron's `torch_dist` checkpoints and in the hub's files.

`links` says where every row of the one lies in the other: pure arithmetic, both ways. Each link is a run of whole
rows found unchanged on both sides, so that a conversion is a copy in another order.

Megatron's names are those of megatron-core's Transformer Engine GPT specification with homogeneous layers, the same
in 0.16.1 and 0.19.2; a test compares them with what a built model asks for.

Convention, for whoever writes such a checkpoint without building a model (L layers, E experts, H hidden, D head
size, N query heads, K key/value heads, F expert width, V vocabulary):

* All layers share one tensor a name: axis 0 is the layer. All experts share one, too: axis 1 is the expert.
* `linear_qkv.weight` [L, (N + 2K) * D, H]: for each of the K groups in turn its N/K query heads, its key head, its
  value head, each of D rows. Rotary halves lie as in the hub's files: no permutation within a head.
* `linear_fc1.weight` [L, E, 2F, H]: w1 (gate) in rows 0..F, w3 (up) in rows F..2F.
  `linear_fc2.weight` [L, E, H, F]: w2.
* `linear_qkv.layer_norm_weight` is the hub's input_layernorm, `pre_mlp_layernorm.weight` its
  post_attention_layernorm, `router.weight` its gate.
* Embedding and output rows may be more than V where tensor parallelism padded them; readers take the first V.
  A tied model has no `output_layer.weight`.
* Chunks within a tensor may be cut any way that tiles it; whatever their cut, any layout loads them.
* `..._extra_state/shard_I_L` (and `shard_I.J_L.E` for experts), each None: what Transformer Engine's modules ask
  for. Our loader needs none of them; upstream's with its default strictness does.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_mixtral.spec.shape import MixtralShape

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}  # of the types that weights are stored in, bytes
LAYER = "decoder.layers"
EXPERTS = f"{LAYER}.mlp.experts.experts"

# Rows beyond the vocabulary are allowed here alone.
PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")


def shapes(shape: MixtralShape) -> dict[str, tuple[int, ...]]:
    """Name -> global shape of every model tensor."""
    layers, hidden, heads = shape.num_hidden_layers, shape.hidden_size, shape.num_attention_heads
    qkv = (heads + 2 * shape.num_key_value_heads) * shape.head_dim
    experts, width = shape.num_local_experts, shape.intermediate_size
    output = {} if shape.tie_word_embeddings else {"output_layer.weight": (shape.vocab_size, hidden)}
    return {
        "embedding.word_embeddings.weight": (shape.vocab_size, hidden),
        f"{LAYER}.self_attention.linear_qkv.layer_norm_weight": (layers, hidden),
        f"{LAYER}.self_attention.linear_qkv.weight": (layers, qkv, hidden),
        f"{LAYER}.self_attention.linear_proj.weight": (layers, hidden, heads * shape.head_dim),
        f"{LAYER}.pre_mlp_layernorm.weight": (layers, hidden),
        f"{LAYER}.mlp.router.weight": (layers, experts, hidden),
        f"{EXPERTS}.linear_fc1.weight": (layers, experts, 2 * width, hidden),
        f"{EXPERTS}.linear_fc2.weight": (layers, experts, hidden, width),
        "decoder.final_layernorm.weight": (hidden,),
        **output,
    }


def extra_states(shape: MixtralShape) -> dict[str, tuple[int, ...]]:
    """Name -> grid of the empty objects that Transformer Engine's modules ask for, one a place in the grid."""
    layers, experts = shape.num_hidden_layers, shape.num_local_experts
    return {
        f"{LAYER}.self_attention.linear_qkv._extra_state": (layers,),
        f"{LAYER}.self_attention.linear_proj._extra_state": (layers,),
        f"{LAYER}.pre_mlp_layernorm._extra_state": (layers,),
        f"{EXPERTS}.linear_fc1._extra_state": (layers, experts),
        f"{EXPERTS}.linear_fc2._extra_state": (layers, experts),
        "decoder.final_layernorm._extra_state": (1,),
    }


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows start:stop of tensor `name`, in the plane that `index` picks from its leading axes (layer, expert)."""

    name: str
    index: tuple[int, ...]
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, most: int) -> Iterator["Rows"]:
        """The same in order, at most `most` rows at a time, but one at least."""
        for start in range(self.start, self.stop, max(1, most)):
            yield Rows(self.name, self.index, start, min(start + max(1, most), self.stop))


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
        """The names of a folder with these tensors; the hub's own if the tensors don't show them."""
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
    """Every row of the model once, in the order of Megatron's planes and of each hub tensor's rows."""
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
    """A hub tensor that is exactly one plane of a Megatron tensor."""
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
