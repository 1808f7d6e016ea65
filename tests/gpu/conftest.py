"""These tests need one GPU, or Triton's interpreter on CPU: TRITON_INTERPRET=1 pytest tests/gpu."""

import pytest
import torch

from megatron_mixtral import fused


@pytest.fixture(scope="session")
def device():
    if reason := fused.missing():
        pytest.skip(f"our kernels can't run here: {reason}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param
