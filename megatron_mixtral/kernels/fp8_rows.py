"""Rounds rows of activations to FP8 (e4m3) with a scale each, in one read; `fp8.quantize` is the plain torch."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rows(x, values, scales, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + at, mask=at < width, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(value)) / LARGEST
    scale = tl.where(scale > 0, scale, 1.0)
    tl.store(scales + row, scale)
    tl.store(values + row * width + at, (value / scale).to(values.dtype.element_ty), mask=at < width)


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K] -> e4m3 [R, K] and fp32 [R]: a row is its values times its scale, one of zeros has scale 1."""
    x = x.contiguous()
    count, width = x.shape
    dtype = torch.float8_e4m3fn
    values, scales = torch.empty_like(x, dtype=dtype), x.new_empty(count, dtype=torch.float32)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 1024, 1), 16)
    _rows[(count,)](x, values, scales, width, LARGEST=torch.finfo(dtype).max, BLOCK=block, num_warps=warps)
    return values, scales
