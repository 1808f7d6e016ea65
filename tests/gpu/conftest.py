"""These tests need one GPU, or Triton's interpreter on CPU: TRITON_INTERPRET=1 pytest tests/gpu."""

import pytest
import torch

from megatron_mixtral import kernels


@pytest.fixture(scope="session")
def device():
    if reason := kernels.missing():
        pytest.skip(f"our kernels can't run here: {reason}")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture
def tiles(device):
    """Our grouped products, on the GPUs that they are for."""
    from megatron_mixtral.kernels import grouped_gemm

    if not (kernels.INTERPRETED or grouped_gemm._have_tiles()):
        pytest.skip("our grouped matmuls need a Hopper GPU and Triton 3.4")
    from megatron_mixtral.kernels import grouped_gemm_hopper

    return grouped_gemm_hopper


@pytest.fixture
def one_rank(device):
    """megatron-core with one rank, for an engine that our own forward pass can serve."""
    from megatron_mixtral.mcore import compat, ranks
    from megatron_mixtral.spec.layout import Layout

    if not compat.ENGINE_COUNTS_ON_DEVICE:
        pytest.skip("megatron-core before 0.19 keeps its bookkeeping elsewhere")
    ranks.initialize(Layout())
    yield
    from megatron.core.inference.utils import InferenceMode

    InferenceMode.unset_active()  # for the tests of training in this process
    ranks.shutdown()
