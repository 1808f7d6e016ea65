"""Builds megatron-core's GPTModel for a Mixtral's shape: this rank's stage and shard, on its device.

`tensors.shapes` lists its tensors in a checkpoint, which are the same for every layout.
"""

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from megatron_mixtral import kernels, mcore
from megatron_mixtral.errors import LayoutError
from megatron_mixtral.kernels import grouped_gemm
from megatron_mixtral.mcore import compat, cpu, ranks
from megatron_mixtral.model import fp8, layers
from megatron_mixtral.model import lora as adapting
from megatron_mixtral.model.layers import LayerParts
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.lora import Lora

from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules


def build(
    shape: MixtralShape,
    layout: Layout,
    *,
    precision: str,
    aux_loss: float = 0.0,
    max_sequence_length: int | None = None,
    random_weights: bool = True,
    parallel_output: bool = True,
    fuse: bool | None = None,
    lora: Lora | None = None,
    fp8_experts: bool = False,
    seed: int = 1234,
    split_sequence: bool = False,
    vp_stage: int | None = None,
    **config: Any,
) -> GPTModel:
    """This rank's part of the model, after `mcore.initialize(layout)`.

    `random_weights=False` leaves parameters uninitialised, for models that are loaded next. `parallel_output=False`
    gathers the vocabulary of the logits over tensor-parallel ranks. `fuse` asks for our own kernels or for none; by
    default they are used wherever they run on a GPU. `lora` freezes everything and puts adapters beside it, whose
    first values follow from `seed`. `fp8_experts` keeps experts' weights in FP8: to serve only, and loaded by
    `loading` alone. `split_sequence` allows context parallelism: each rank is then given its stretches of every
    sequence. `vp_stage` is which of this rank's chunks to build where `mcore.initialize` was told of several.
    Further keywords are fields of megatron-core's TransformerConfig. `LayoutError` when the shape can't be cut so.
    """
    layout.check(shape)
    if layout.context > 1 and not split_sequence:
        raise LayoutError(f"context parallel {layout.context}: only training splits the sequence; use 1")
    kind, parts = _kind(fuse, lora=lora, fp8_experts=fp8_experts)
    with mcore.quiet():
        settings = transformer_config(
            shape, layout, precision=precision, aux_loss=aux_loss, perform_initialization=random_weights, **config
        )
        model = kind(
            config=settings,
            transformer_layer_spec=decoder_spec(
                settings, parts=parts, vp_stage=vp_stage, own=lora is not None or fp8_experts
            ),
            vocab_size=padded_vocabulary(shape, layout),
            max_sequence_length=max_sequence_length or shape.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=shape.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=shape.rope_theta,
            vp_stage=vp_stage,
        ).to(ranks.device())
    model.shape, model.fused = shape, kind is not GPTModel
    model.lora, model.base = lora, {}  # a trainer sets `base`, the weights that the adapters belong to
    _mark_cut(model)
    _set_experts_apart(model)
    _hide_padding(model, shape)
    if lora:
        adapting.attach(model, lora, seed=seed)
    return model


def _kind(fuse: bool | None, *, lora: Lora | None, fp8_experts: bool) -> tuple[type[GPTModel], LayerParts]:
    """The model's class and the parts of its layers."""
    if fuse is None:
        fuse = cpu.HAVE_GPU and kernels.missing() is None
    kind, parts = GPTModel, LayerParts()
    if fuse:
        from megatron_mixtral.model import fused  # needs triton, which is there wherever kernels are

        kind, parts = fused.Model, fused.PARTS
    if lora and lora.experts:
        parts = replace(parts, experts=adapting.Experts)
    if fp8_experts:
        parts = replace(parts, experts=fp8.Experts)
    return kind, parts


def decoder_spec(
    config: TransformerConfig, *, parts: LayerParts, vp_stage: int | None, own: bool
) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage, and the norm after the last; `own` uses our layers even if Transformer
    Engine is installed.
    """
    if compat.have_transformer_engine() and not own:
        return compat.transformer_engine_block(config, vp_stage=vp_stage)
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=parts.norm,
            self_attention=ModuleSpec(
                module=parts.self_attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=parts.core_attention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=parts.block_norm,
            mlp=compat.moe_spec(parts.moe, experts=parts.experts),
            mlp_bda=get_bias_dropout_add,
            # Transformer Engine fuses this norm into the projection and names it so in checkpoints.
            sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
        ),
    )
    count = compat.layers_of_stage(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=parts.block_norm)


def ways(model: GPTModel) -> str:
    """Describes how the layers are computed here, and why not faster."""
    if compat.have_transformer_engine() and not model.lora:
        return "layers by Transformer Engine"
    if not model.fused:
        return f"layers in plain torch: {kernels.missing() or 'our kernels are turned off'}"
    if model.lora and model.lora.experts:
        one_by_one = (
            ""
            if model.lora.rank % 8 == 0
            else f", those one by one, because rank {model.lora.rank} isn't a multiple of 8"
        )
        return f"layers by our kernels; experts with adapters in plain torch{one_by_one}"
    said = ["layers by our kernels", grouped_gemm.describe()]
    if model.config.moe_expert_capacity_factor:
        said.append("routing by megatron-core, because experts have a capacity")
    if not layers.VARLEN:
        said.append("packed conversations one by one, because torch is older than 2.11")
    return "; ".join(said)


def transformer_config(
    shape: MixtralShape, layout: Layout, *, precision: str, aux_loss: float, **overrides: Any
) -> TransformerConfig:
    """megatron-core's settings for this shape and layout."""
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    settings: dict[str, Any] = {
        "num_layers": shape.num_hidden_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.intermediate_size,
        "moe_ffn_hidden_size": shape.intermediate_size,
        "num_attention_heads": shape.num_attention_heads,
        "num_query_groups": shape.num_key_value_heads,
        "kv_channels": shape.head_dim,
        "window_size": (shape.sliding_window - 1, 0) if shape.sliding_window else None,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.rms_norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": F.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": shape.initializer_range,
        "num_moe_experts": shape.num_local_experts,
        "moe_router_topk": shape.num_experts_per_tok,
        "moe_router_pre_softmax": shape.num_experts_per_tok == 1,  # what it insists on for one; see below
        "moe_router_load_balancing_type": "aux_loss" if aux_loss else "none",
        "moe_aux_loss_coeff": aux_loss,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
        "tensor_model_parallel_size": layout.tensor,
        "pipeline_model_parallel_size": layout.pipeline,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "context_parallel_size": layout.context,
        "sequence_parallel": layout.tensor
        > 1,  # megatron-core needs this to train experts under tensor parallelism
        "pipeline_model_parallel_layout": uneven_stages(shape, layout),
        "bf16": precision == "bf16",
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "gradient_accumulation_fusion": False,
    }
    config = TransformerConfig(**settings | overrides)
    config.moe_router_pre_softmax = False  # Mixtral's routing weights are a softmax over only the chosen experts
    return config


def uneven_stages(shape: MixtralShape, layout: Layout) -> list[list[str]] | None:
    """The layers of each stage if they don't divide evenly: earlier stages have one more.

    None if they do, which megatron-core handles itself.
    """
    if shape.num_hidden_layers % layout.pipeline == 0:
        return None
    stages = [["decoder"] * count for count in layout.stages(shape.num_hidden_layers)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def padded_vocabulary(shape: MixtralShape, layout: Layout) -> int:
    """Rows of the embedding: the vocabulary, padded to a multiple of the tensor-parallel ranks."""
    return math.ceil(shape.vocab_size / layout.tensor) * layout.tensor


def _mark_cut(model: GPTModel) -> None:
    """Mark divided tensors, so every rank's part counts in the gradient's norm.

    megatron-core marks parts when it draws random values. Without random values it would count only the first
    rank's part.
    """
    cuts = {ColumnParallelLinear: 0, RowParallelLinear: 1, VocabParallelEmbedding: 0}
    for module in model.modules():
        cut = next((axis for kind, axis in cuts.items() if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if cut is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, True, cut, 1)


def _set_experts_apart(model: GPTModel) -> None:
    """Give experts their own optimizer, with gradients averaged over the ranks that hold them.

    megatron-core does so only if experts are divided over ranks. Checkpoints would then have one optimizer or two,
    and one kind couldn't be loaded as the other.
    """
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]


def _hide_padding(model: GPTModel, shape: MixtralShape) -> None:
    """Set the logits of padding rows to the smallest number, so they don't count in a loss or a sample."""
    if not model.post_process or model.vocab_size == shape.vocab_size:
        return
    rows, tokens = model.vocab_size, shape.vocab_size
    rank = parallel_state.get_tensor_model_parallel_rank()

    def hide(_: Any, __: Any, output: tuple[torch.Tensor, Any]) -> tuple[torch.Tensor, Any]:
        logits, bias = output
        width = logits.shape[-1]  # this rank's part of the logits, or all if they were gathered
        columns = torch.arange(width, device=logits.device) + (0 if width == rows else rank * width)
        return logits.masked_fill(columns >= tokens, torch.finfo(logits.dtype).min), bias

    model.output_layer.register_forward_hook(hide)
