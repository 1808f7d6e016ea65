"""A Megatron model on real ranks: built, run, and seen part by part, beside the tensors that it should hold."""

from pathlib import Path


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
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape

    layout, shape = Layout(**layout), MixtralShape.from_folder(Path(folder))
    ranks.initialize(layout, timeout=60)
    return build.build(shape, layout, precision="fp32", **options)


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
