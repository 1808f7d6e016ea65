"""The tensors of a Mixtral in Megatron's `torch_dist` checkpoints: every name with its global shape, by arithmetic.

The names are those of megatron-core's Transformer Engine GPT specification with homogeneous layers, the same in
0.16.1 and 0.19.2; a test compares them with what a built model asks for.

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

from megatron_mixtral.spec.jobs import MixtralShape

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
