"""Attention over the dynamic engine's paged cache in plain torch, in place of flash-attention packages.

The engine's attention passes through one method of megatron-core's `Attention`, which is replaced here.
Shapes: T query tokens of all requests in a row, R requests, N query heads, K key/value heads, D head size, P pages
of S positions each.
"""

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_mixtral.model.layers import causal_mask, window_of

from megatron.core.transformer import attention as upstream
from megatron.core.transformer.attention import SelfAttention


def use_paged_attention(model: torch.nn.Module) -> None:
    """Give every self-attention of `model` the method below; weights and all else stay as they are."""
    upstream.HAVE_FA3 = True  # what `forward` asserts before it calls the method that needs no such package
    for module in model.modules():
        if isinstance(module, SelfAttention):
            module.flash_decode_and_prefill = partial(paged_attention, module)  # type: ignore[method-assign]


def paged_attention(
    attention: SelfAttention,
    q: Tensor,  # [T, 1, N, D]
    k: Tensor,  # [P, S, K, D]
    v: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    cu_seqlens_q: Tensor,  # [R + 1]
    cu_seqlens_k: Tensor,
    seqlens_k: Tensor,  # [R]
    block_table: Tensor,  # [R, most pages]
    is_decode_only: bool,
    softmax_offset: Tensor | None = None,
) -> Tensor:  # [T, 1, N, D]; padding rows stay 0
    """Reads keys and values page by page and gives them to scaled_dot_product_attention."""
    assert softmax_offset is None, "Mixtral has no attention sinks"
    window = window_of(attention.config)
    scale = attention.config.softmax_scale or q.shape[-1] ** -0.5
    if is_decode_only:
        return _decode(q, k, v, seqlens_k, block_table, window, scale)
    out = torch.zeros_like(q)
    starts, keys = cu_seqlens_q.tolist(), seqlens_k.tolist()
    for row, (start, stop) in enumerate(itertools.pairwise(starts)):
        if stop > start:
            pages = block_table[row, : -(-keys[row] // k.shape[1])]
            k_here, v_here = (x[pages].flatten(0, 1)[: keys[row]] for x in (k, v))
            out[start:stop, 0] = _causal(q[start:stop, 0], k_here, v_here, window, scale)
    return out


def _causal(q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float) -> Tensor:
    """The last len(q) positions of one request look at themselves and at all before them."""
    mask = causal_mask(len(q), len(k), window, q.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    causal: dict[str, Any] = {"attn_mask": mask, "is_causal": mask is None and q.shape[2] > 1}
    out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=q.shape[1] != k.shape[1], **causal)
    return out.squeeze(0).transpose(0, 1)


def _decode(
    q: Tensor, k: Tensor, v: Tensor, seqlens_k: Tensor, block_table: Tensor, window: int | None, scale: float
) -> Tensor:
    """One new position a request: all requests in one call, shorter ones masked."""
    longest = int(seqlens_k.max())
    pages = block_table[:, : -(-longest // k.shape[1])].clamp(min=0).long()
    keys, values = (x[pages].flatten(1, 2)[:, :longest].transpose(1, 2) for x in (k, v))  # [R, K, longest, D]
    position = torch.arange(longest, device=q.device)
    seen = position < seqlens_k.unsqueeze(1)
    # A page is uninitialised beyond its end, and zero times NaN is NaN.
    keys, values = (x.masked_fill(~seen[:, None, :, None], 0.0) for x in (keys, values))
    if window is not None:
        seen &= position >= seqlens_k.unsqueeze(1) - window
    seen[:, 0] |= seqlens_k == 0  # a padding row must see something, or it would be NaN
    rows = len(seqlens_k)
    out = torch.zeros_like(q)
    out[:rows] = F.scaled_dot_product_attention(
        q[:rows].transpose(1, 2),
        keys,
        values,
        attn_mask=seen[:, None, None, :],
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return out
