"""Experts in FP8: how far from what they were, and each way of multiplying beside plain products of the same."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from engine_replica import SHAPE, apart, logits_of_each_token, prompts_of, replica

from megatron_mixtral import kernels
from megatron_mixtral.spec.layout import Layout

pytestmark = pytest.mark.gpu
CLOSE = 1e-5 if kernels.INTERPRETED else 1e-2  # the interpreter computes in fp32, a GPU in bf16


@pytest.fixture(autouse=True)
def _seeded(device):
    torch.manual_seed(0)


def distance(ours, exact):
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def in_fp8(weight):
    """The weight as it is kept, its scales, and what it has become, in double precision."""
    from megatron_mixtral.model import fp8

    values, scale = torch.empty_like(weight, dtype=fp8.DTYPE), torch.empty(weight.shape[:-1], device=weight.device)
    fp8.quantize(weight, values, scale)
    return values, scale, values.double() * scale.double().unsqueeze(-1)


def test_each_weight_is_off_by_a_sixteenth_at_most(dtype, device):
    rows = torch.randn(3, 40, 256, device=device) * torch.logspace(-6, 6, 40, device=device)[:, None]
    rows[1, 7] = 0
    rows = rows.to(dtype)
    values, scale, became = in_fp8(rows)
    exact, largest = rows.double(), rows.double().abs().amax(-1, keepdim=True)
    # Half a step of four significant bits, and below 2^-6 of e4m3 half a step of 2^-9.
    bound = torch.maximum(exact.abs() / 16, largest / 448 / 1024) * 1.001
    assert torch.all((became - exact).abs() <= bound)
    assert distance(became, exact) < 0.03
    assert torch.all((values.float().abs().amax(-1) == 448) | (largest.squeeze(-1) == 0))
    assert torch.all(values[1, 7].float() == 0)
    assert scale[1, 7] == 1


@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 384), (33, 14336)])
def test_rows_become_fp8_in_one_kernel_as_in_plain_torch(rows, width, device):
    from megatron_mixtral.kernels import fp8_rows

    x = torch.randn(rows, width, device=device).to(torch.float32 if kernels.INTERPRETED else torch.bfloat16)
    x[rows // 2] = 0
    values, scale = fp8_rows.rows(x)
    expected, expected_scale, _ = in_fp8(x)
    assert torch.allclose(scale, expected_scale, rtol=1e-6)
    # The interpreter loses a carry when it rounds to FP8: 127.9 becomes 64.
    same = (values.float() == expected.float()).float().mean()
    assert same > (0.97 if kernels.INTERPRETED else 0.999)


ROUTES = {  # each token's two experts of four
    "spread": lambda t: [t % 4, (t + 1) % 4],
    "all to the same": lambda _: [1, 2],
    "one has none": lambda t: [t % 3, (t + 1) % 3],
}


# One of each way to cut the products.
@pytest.mark.parametrize(
    ("tokens", "route"), [(1, "spread"), (7, "one has none"), (40, "all to the same"), (150, "spread")]
)
def test_few_tokens_meet_the_weights_that_fp8_has_made(tokens, route, device):
    from megatron_mixtral.kernels import choose_experts, small_batch

    dtype = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    hidden, width = 128, 256
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    fc1, fc2 = torch.randn(4, 2 * width, hidden, device=device), torch.randn(4, hidden, width, device=device)
    fc1, fc2 = ((w / 10 * torch.logspace(-1, 1, len(w[0]), device=device)[:, None]).to(dtype) for w in (fc1, fc2))
    fc1[1, 3] = fc2[2, 5] = 0
    (fc1, scale1, exact1), (fc2, scale2, exact2) = in_fp8(fc1), in_fp8(fc2)
    chosen = torch.tensor([sorted(ROUTES[route](t)) for t in range(tokens)], dtype=torch.int32, device=device)
    probs = torch.rand(tokens, 2, device=device).to(dtype)
    made = choose_experts.Choice(experts=chosen, probs=probs)
    rows = small_batch.experts(x, made, choose_experts.sort(made, 4), fc1, fc2, (scale1, scale2))
    residual = torch.zeros_like(x)
    small_batch.add_and_norm(residual, rows, torch.ones_like(x[0]), 1e-6)
    assert distance(residual, in_double(x, chosen, probs, exact1, exact2)) < CLOSE


def in_double(x, chosen, probs, fc1, fc2):
    total = torch.zeros(len(x), fc2.shape[1], dtype=torch.float64, device=x.device)
    for k in range(chosen.shape[1]):
        e = chosen[:, k].long()
        gate, up = torch.einsum("tnk,tk->tn", fc1[e], x.double()).chunk(2, dim=1)
        inner = F.silu(gate) * up * probs[:, k, None].double()
        total += torch.einsum("tnk,tk->tn", fc2[e], inner)
    return total


COUNTS = [(5, 0, 17, 3), (0, 0, 64, 0), (1, 0, 0, 0), (65, 130, 1, 300)]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("tiled", [True, False])
def test_many_tokens_meet_the_weights_that_fp8_has_made(tiled, counts, device, request):
    """In tiles rows are rounded, too, to four significant bits."""
    from megatron_mixtral.kernels import experts, grouped_gemm

    if tiled:
        request.getfixturevalue("tiles")
    dtype = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    x = torch.randn(sum(counts), 128, device=device).to(dtype)
    (fc1, scale1, exact1), (fc2, scale2, exact2) = (
        in_fp8((torch.randn(4, *shape, device=device) / 10).to(dtype)) for shape in ((512, 128), (128, 256))
    )
    probs = torch.rand(len(x), device=device).to(dtype)
    counted = torch.tensor(counts, dtype=torch.int32, device=device)
    way = grouped_gemm.Tiled(counted.cumsum(0, dtype=torch.int32)) if tiled else grouped_gemm.OneByOne(counted)
    out = experts.forward(x, probs, way, fc1, fc2, (scale1, scale2))
    chosen = torch.arange(4, device=device).repeat_interleave(counted)[:, None]
    assert out.dtype == dtype
    rounded = 0.2 if kernels.INTERPRETED else 6e-2  # the interpreter loses a carry when it rounds to FP8
    assert distance(out, in_double(x, chosen, probs[:, None], exact1, exact2)) < (rounded if tiled else CLOSE)


@pytest.mark.parametrize("counts", COUNTS)
def test_a_product_in_tiles_is_what_it_says(counts, tiles, device):
    """Rows that FP8 holds without loss give what the plain product of the same numbers gives."""
    weight, scale, exact = in_fp8(torch.randn(4, 272, 144, device=device))
    counted = torch.tensor(counts, dtype=torch.int32, device=device)
    x = torch.randint(-7, 8, (sum(counts), 144), device=device) * 64.0
    x[:, 0] = 448
    x = x if kernels.INTERPRETED else x.bfloat16()
    out = tiles.product(x, weight.transpose(1, 2), counted.cumsum(0, dtype=torch.int32), scale)
    expert = torch.arange(4, device=device).repeat_interleave(counted)
    assert distance(out, torch.einsum("tnk,tk->tn", exact[expert], x.double())) < 5e-3


def test_logits_are_the_engines_own_and_near_those_without_fp8(one_rank):
    # Two experts of two: no token changes its expert by a rounding.
    shape = dataclasses.replace(SHAPE, num_local_experts=2)
    ours, engines, without = (
        logits_of_each_token(replica(shape, Layout(), ours=o, in_fp8=f), prompts_of((3, 20)), tokens=2)
        for f, o in ((True, True), (True, False), (False, False))
    )
    same, lost = sorted(apart(ours, engines)), sorted(apart(ours, without))
    print(f"\n  logits apart: ours and the engine's {same[-1]:.1e}; with FP8 and without {lost[-1]:.1e}")
    assert same[-1] < (1e-4 if kernels.INTERPRETED else 0.2)  # the engine's products round rows to FP8 as well
    assert lost[0] > 1e-3
    assert lost[-1] < 0.2
