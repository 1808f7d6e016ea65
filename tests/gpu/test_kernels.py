"""Each fused part beside the same formula in plain torch, in double precision on the same inputs."""

import pytest
import torch
import torch.nn.functional as F

from megatron_mixtral import kernels

pytestmark = pytest.mark.gpu
# The interpreter cuts numbers off where a GPU rounds them.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 2e-2 if kernels.INTERPRETED else 6e-3}


@pytest.fixture(autouse=True)
def _needs_kernels(device):
    torch.manual_seed(0)


def distance(ours, exact):
    """Relative norm of the difference; NaN never passes."""
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm().clamp_min(1e-30))


def leaf(*shape, dtype, device):
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def exact_copy(*tensors):
    return [t.detach().double().requires_grad_() for t in tensors]


def compare(ours, exact, inputs, exact_inputs, dtype):
    """Values and all gradients, under one random gradient of the output."""
    assert distance(ours, exact) < BOUND[dtype]
    given = torch.randn_like(ours)
    ours.backward(given)
    exact.backward(given.double())
    for mine, reference in zip(inputs, exact_inputs, strict=True):
        assert distance(mine.grad, reference.grad) < BOUND[dtype]


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 384), (33, 2048), (3, 14336)])
def test_swiglu_times_probability(rows, width, dtype, device):
    from megatron_mixtral.kernels.swiglu import SwiGLU

    both, probs = leaf(rows, 2 * width, dtype=dtype, device=device), leaf(rows, dtype=dtype, device=device)
    exact_both, exact_probs = exact_copy(both, probs)
    gate, up = exact_both.chunk(2, dim=-1)
    compare(
        SwiGLU.apply(both, probs),
        F.silu(gate) * up * exact_probs.unsqueeze(-1),
        (both, probs),
        (exact_both, exact_probs),
        dtype,
    )


@pytest.mark.parametrize(("shape", "eps"), [((1, 1, 8), 1e-5), ((7, 3, 96), 1e-5), ((40, 2, 4096), 1e-6)])
def test_rms_norm(shape, eps, dtype, device):
    from megatron_mixtral.kernels.rmsnorm import RMSNorm

    x, weight = leaf(*shape, dtype=dtype, device=device), leaf(shape[-1], dtype=dtype, device=device)
    inputs = exact_copy(x, weight)
    exact = F.rms_norm(inputs[0], (shape[-1],), inputs[1], eps)
    compare(RMSNorm.apply(x, weight, eps), exact, (x, weight), inputs, dtype)


def rotated(x, angles):
    low, high = x.chunk(2, dim=-1)
    cos, sin = (f(angles)[:, None, None, :] for f in (torch.cos, torch.sin))
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@pytest.mark.parametrize(
    ("s", "b", "groups", "queries", "size"), [(1, 1, 1, 1, 16), (9, 2, 2, 4, 32), (17, 3, 8, 4, 128)]
)
def test_split_and_rotate(s, b, groups, queries, size, dtype, device):
    from megatron_mixtral.kernels.rope import SplitRotate

    mixed = leaf(s, b, groups, (queries + 2) * size, dtype=dtype, device=device)
    angles = torch.outer(
        torch.arange(s, device=device) * 100.0, 1e6 ** (-torch.arange(size // 2, device=device) * 2 / size)
    )
    (exact,) = exact_copy(mixed)
    q, k, v = exact.split([queries * size, size, size], dim=-1)
    q = q.reshape(s, b, groups * queries, size)
    expected = torch.cat([rotated(q, angles.double()), rotated(k, angles.double()), v], dim=2)
    got = torch.cat(SplitRotate.apply(mixed, angles.cos(), angles.sin(), size), dim=2)
    compare(got, expected, [mixed], [exact], dtype)


@pytest.mark.parametrize(("tokens", "vocabulary"), [(1, 7), (5, 4096), (9, 32000)])
def test_cross_entropy(tokens, vocabulary, dtype, device):
    from megatron_mixtral.kernels.cross_entropy import CrossEntropy

    logits = leaf(tokens, vocabulary, dtype=dtype, device=device)
    labels = torch.randint(vocabulary, (tokens,), device=device)
    (exact,) = exact_copy(logits)
    ours = CrossEntropy.apply(logits.clone(), labels, None)
    compare(ours, F.cross_entropy(exact, labels, reduction="none"), [logits], [exact], dtype)


def test_cross_entropy_of_far_apart_logits_is_finite(device):
    from megatron_mixtral.kernels.cross_entropy import CrossEntropy

    logits = torch.full((2, 9000), -1e4, device=device)
    logits[0, 8999] = 1e4
    losses = CrossEntropy.apply(logits, torch.tensor([8999, 0], device=device), None)
    assert losses[0].item() == 0
    assert losses[1].item() == pytest.approx(9.105, abs=2e-3)


CROWDS = {
    "random": lambda t, e: torch.rand(t, e).topk(2, dim=1).indices,
    "one token": lambda t, e: torch.rand(1, e).topk(2, dim=1).indices,
    "all to the same two": lambda t, e: torch.tensor([[e - 1, 0]]).expand(t, 2),
    "empty experts": lambda t, e: torch.rand(t, e // 2).topk(2, dim=1).indices * 2,
}


@pytest.mark.parametrize("crowd", CROWDS)
@pytest.mark.parametrize(("hidden", "width"), [(64, 128), (136, 264)])
def test_experts_behind_real_routing(crowd, hidden, width, dtype, device):
    from megatron_mixtral.kernels import experts, permute

    count = 8
    indices = CROWDS[crowd](50, count).to(device)
    tokens = len(indices)
    chosen = torch.zeros(tokens, count, dtype=torch.bool, device=device).scatter_(1, indices, True)
    x = leaf(tokens, hidden, dtype=dtype, device=device)
    probs = (torch.rand(tokens, count, device=device) * chosen).to(dtype).requires_grad_()
    fc1 = leaf(count, 2 * width, hidden, dtype=dtype, device=device)
    fc2 = leaf(count, hidden, width, dtype=dtype, device=device)
    inputs = exact_copy(x, probs, fc1, fc2)

    plan = permute.plan(chosen, 2)
    rows, row_probs = permute.Spread.apply(x, probs, plan)
    ours = permute.Gather.apply(experts.GroupedExperts.apply(rows, row_probs, plan.counts, fc1, fc2), plan)
    compare(ours, dense_experts(*inputs, chosen), (x, probs, fc1, fc2), inputs, dtype)


def dense_experts(x, probs, fc1, fc2, chosen):
    """Every expert on every token, masked: no routing that could be wrong."""
    gate, up = torch.einsum("th,efh->etf", x, fc1).chunk(2, dim=-1)
    out = torch.einsum("etf,ehf->eth", F.silu(gate) * up, fc2)
    return torch.einsum("eth,te->th", out, probs * chosen)


def test_every_row_of_the_plan_is_taken_once(device):
    from megatron_mixtral.kernels import permute

    chosen = torch.zeros(97, 8, dtype=torch.bool, device=device)
    chosen.scatter_(1, torch.rand(97, 8, device=device).topk(2, dim=1).indices, True)
    plan = permute.plan(chosen, 2)
    assert sorted(plan.place[chosen].tolist()) == list(range(194))
    assert plan.counts.tolist() == chosen.sum(0).tolist()
    by_expert = torch.repeat_interleave(torch.arange(8, device=device), plan.counts.long())
    assert torch.equal(by_expert[plan.place[chosen].long()], chosen.nonzero()[:, 1])


def test_tokens_that_do_not_count_are_sent_nowhere(device):
    """A decoding batch is filled up to the size of its graph."""
    from megatron_mixtral.kernels import choose_experts

    x, probs = torch.randn(5, 8, device=device), torch.rand(5, 2, device=device)
    # -1, and what is no expert at all
    experts = torch.tensor([[0, 2], [1, 2], [0, 1], [-1, -1], [99, 4]], dtype=torch.int32, device=device)
    chosen = choose_experts.Choice(experts=experts, probs=probs)
    order = choose_experts.sort(chosen, 4)
    assert order.ends.tolist() == [2, 4, 6, 6]
    assert order.place.tolist() == [[0, 4], [2, 5], [1, 3], [-1, -1], [-1, -1]]
    rows, row_probs = choose_experts.spread(x, chosen, order)
    assert torch.equal(rows[:6], x[[0, 2, 1, 2, 0, 1]])
    assert torch.equal(row_probs[:6], probs.flatten()[[0, 4, 2, 5, 1, 3]])


def test_a_token_without_numbers_goes_to_different_experts_all_the_same(device):
    from megatron_mixtral.kernels import choose_experts

    x, router = torch.full((3, 128), float("nan"), device=device), torch.randn(8, 128, device=device)
    x[1] = 1
    made = choose_experts.choose(x, router, 2, torch.tensor([3], dtype=torch.int32, device=device))
    assert all(0 <= a < b < 8 for a, b in made.experts.tolist())


def test_weight_gradients_are_added_to_the_fp32_buffer(device):
    from megatron_mixtral.kernels import experts

    counts = torch.tensor([3, 0, 5, 8], device=device)
    rows, probs = leaf(16, 64, dtype=torch.bfloat16, device=device), torch.rand(16, device=device).bfloat16()
    fc1, fc2 = (leaf(4, *shape, dtype=torch.bfloat16, device=device) for shape in [(128, 64), (64, 64)])
    experts.GroupedExperts.apply(rows, probs, counts, fc1, fc2).sum().backward()
    expected = [fc1.grad, fc2.grad]
    for weight in (fc1, fc2):
        weight.grad, weight.main_grad = None, torch.ones(weight.shape, device=device)
    for _ in range(2):
        experts.GroupedExperts.apply(rows, probs, counts, fc1, fc2).sum().backward()
    for weight, gradient in zip((fc1, fc2), expected, strict=True):
        assert weight.grad_added_to_main_grad
        assert distance(weight.main_grad - 1, 2 * gradient) < 6e-3


def ways():
    from megatron_mixtral.kernels import grouped_gemm

    here = {"one by one": grouped_gemm.OneByOne}
    if torch.cuda.is_available():
        here["grouped"] = lambda counts: grouped_gemm.Grouped(counts, adds=True)
    if grouped_gemm._quack_version():
        here["quack"] = grouped_gemm.Quack
    return here


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [0, 0, 0, 1], [0, 700, 0, 0], [130, 257, 1, 90], [0, 0, 0, 0]])
@pytest.mark.parametrize("name", ["one by one", "grouped", "quack"])
def test_products_of_each_experts_rows(name, counts, device):
    if name not in ways():
        pytest.skip(f"no {name} products on this machine")
    products = ways()[name](torch.tensor(counts, dtype=torch.int32, device=device))
    rows = sum(counts)
    x, grad = (torch.randn(rows, width, device=device).bfloat16() for width in (136, 264))
    weight = torch.randn(4, 264, 136, device=device).bfloat16()
    total = torch.randn(4, 264, 136, device=device)
    before = total.double()
    parts = [(i, slice(sum(counts[:i]), sum(counts[: i + 1]))) for i in range(4)]

    forward, back = products.of(x, weight.transpose(1, 2)), products.of(grad, weight)
    between = torch.stack([grad[s].double().t() @ x[s].double() for _, s in parts])
    products.add_between(total, grad, x)
    assert distance(total, before + between) < 1e-5
    assert distance(products.between(grad, x), between) < BOUND[torch.bfloat16]
    if rows:
        assert distance(forward, torch.cat([x[s].double() @ weight[i].double().t() for i, s in parts])) < 6e-3
        assert distance(back, torch.cat([grad[s].double() @ weight[i].double() for i, s in parts])) < 6e-3


@pytest.mark.parametrize("counts", [[3, 0, 5, 8], [0, 0, 0, 1], [0, 700, 0, 0], [130, 257, 1, 64], [0, 0, 0, 0]])
def test_products_in_tiles(counts, tiles, device):
    """Widths and depth that no tile divides; at the end a row that is nobody's, and no number."""
    dtype = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    counted = torch.tensor(counts, dtype=torch.int32, device=device)
    ends, rows = counted.cumsum(0, dtype=torch.int32), sum(counts)
    x, weight = (
        torch.randn(rows + 1, 136, device=device).to(dtype),
        torch.randn(4, 264, 136, device=device).to(dtype),
    )
    x[rows] = float("nan")
    probs, across = torch.rand(rows + 1, device=device).to(dtype), weight.transpose(1, 2)
    expert = torch.arange(4, device=device).repeat_interleave(counted)
    exact = torch.einsum("tk,tnk->tn", x[:rows].double(), weight.double()[expert])
    gate, up = exact.chunk(2, dim=1)
    if rows:
        assert distance(tiles.product(x, across, ends)[:rows], exact) < BOUND[dtype]
        inner = torch.nn.functional.silu(gate) * up * probs[:rows, None].double()
        assert distance(tiles.swiglu(x, across, probs, ends)[:rows], inner) < BOUND[dtype]
    assert tiles.product(x[:0], across, torch.zeros_like(ends)).shape == (0, 264)


@pytest.mark.parametrize("lengths", [(), (1,), (64, 65, 3), (130, 1, 1, 200, 128, 7, 64)])
@pytest.mark.parametrize("before", [0, 3000, -7])
def test_prompts_are_cut_into_blocks_whatever_lay_behind_their_bounds(lengths, before, device):
    from megatron_mixtral.kernels import paged_attention

    old = range(before, before + 8 * 99, 99)  # of seven, from another step
    bounds = torch.tensor(old, dtype=torch.int32, device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    bounds[: len(ends)] = ends
    cut = paged_attention.cut(bounds, ends[-1:].int(), sum(lengths) + 20, 7)
    expected = [(r, row) for r, length in enumerate(lengths) for row in range(0, length, paged_attention.ROWS)]
    assert list(zip(cut.requests.tolist(), cut.rows.tolist(), strict=True))[: len(expected)] == expected
    assert set(cut.requests[len(expected) :].tolist()) <= {-1}


@pytest.mark.parametrize("tokens", [1, 3, 700])
def test_embedding_gradients_are_added_to_their_rows(tokens, device):
    from megatron_mixtral.kernels.embedding import add_rows

    ids = torch.randint(20, (tokens,), device=device).clamp(max=9)  # one of them very often
    grad = torch.randn(tokens, 520, device=device).bfloat16()
    total = torch.randn(20, 520, device=device)
    expected = total.double().index_add(0, ids, grad.double())
    add_rows(total, ids, grad)
    assert distance(total, expected) < 1e-6


def test_second_backward_pass_is_refused(device):
    from megatron_mixtral.kernels.cross_entropy import CrossEntropy

    logits = leaf(3, 10, dtype=torch.float32, device=device)
    losses = CrossEntropy.apply(logits.clone(), torch.tensor([1, 2, 3], device=device), None).sum()
    losses.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second backward pass isn't possible"):
        losses.backward()


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_adam_beside_torchs(scale, device):
    from megatron_mixtral.kernels.adam import FusedAdamW

    start = torch.randn(10_000, device=device)
    settings = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    copy = torch.empty(10_000, dtype=torch.bfloat16, device=device)
    mine = FusedAdamW([{"params": [ours], **settings}], {ours: copy})
    mine.scale, plain = scale, torch.optim.AdamW([theirs], **settings)
    for _ in range(5):
        ours.grad = torch.randn_like(start)
        theirs.grad = ours.grad * scale
        mine.step()
        plain.step()
    assert distance(ours, theirs) < 1e-6
    assert distance(copy, ours) < BOUND[torch.bfloat16]
    for name in ("exp_avg", "exp_avg_sq"):
        assert distance(mine.state[ours][name], plain.state[theirs][name]) < 1e-6
    assert float(mine.state[ours]["step"]) == 5
