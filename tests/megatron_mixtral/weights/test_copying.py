"""What is finite by the bits of its exponent is what torch calls finite."""

import pytest
import torch

from megatron_mixtral.weights import copying


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_exactly_what_torch_calls_finite_is_finite(dtype):
    kind = getattr(torch, dtype)
    width = torch.finfo(kind).bits
    highest = torch.arange(0, 1 << 16, 7, dtype=torch.int64) << (width - 16)
    edges = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, torch.finfo(kind).max], dtype=kind)
    signed = (highest - (highest >> (width - 1) << width)).to(torch.int16 if width == 16 else torch.int32)
    for value in torch.cat([signed.view(kind), edges]):
        data = memoryview(value.reshape(1).view(torch.uint8).numpy())
        assert copying.all_finite(data, dtype) == bool(torch.isfinite(value)), value
    assert copying.all_finite(memoryview(b""), dtype)
