"""Our own forward pass for the serving engine beside the engine's: the same logits, in any company."""

import dataclasses
import random

import pytest
import torch
from engine_replica import SHAPE, logits_of_each_step, replica

from megatron_mixtral import kernels
from megatron_mixtral.spec.jobs import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


def distances(shape, layout, lengths, tokens):
    """Of our logits and the engine's, in each step of prompts of these lengths."""
    draw = random.Random(1)
    prompts = [[draw.randrange(512) for _ in range(n)] for n in lengths]
    ours, engines = (logits_of_each_step(replica(shape, layout, ours=o), prompts, tokens) for o in (True, False))
    assert [r for r, _ in ours] == [r for r, _ in engines]
    return [float((a - b).norm() / b.norm()) for (_, a), (_, b) in zip(ours, engines, strict=True)]


def assert_small(apart):
    assert max(apart) < (1e-4 if kernels.INTERPRETED else 0.5), apart  # bf16 sends some tokens to other experts
    assert sorted(apart)[len(apart) // 2] < (1e-5 if kernels.INTERPRETED else 5e-2), apart


@pytest.mark.parametrize(("window", "tied"), [(None, False), (24, True)])
def test_logits_are_the_engines_own(window, tied):
    shape = dataclasses.replace(SHAPE, sliding_window=window, tie_word_embeddings=tied)
    assert_small(distances(shape, Layout(), (1, 33, 100, 64, 5, 17), tokens=6))  # more than run at once


def on_each_stage(shape, layout):
    from megatron_mixtral.mcore import ranks

    ranks.initialize(layout)
    found = distances(shape, layout, (1, 70, 5), tokens=3)
    ranks.shutdown()
    return found


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="fewer than two GPUs")
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_stages_make_the_same_logits_on_all_ranks(tied):
    from spawn_ranks import ranks

    shape = dataclasses.replace(SHAPE, num_hidden_layers=3, tie_word_embeddings=tied)
    first, last = ranks(2, on_each_stage, shape, Layout(pipeline=2), timeout=250)
    assert_small(first)
    assert first == last


@pytest.mark.parametrize("tokens", [1, 2, 40, 300, 600])
def test_experts_for_few_tokens_are_those_for_many(tokens, device):
    from megatron_mixtral.kernels import choose_experts, small_batch

    torch.manual_seed(0)
    hidden, width, count = (256, 128, 8) if not kernels.INTERPRETED else (128, 128, 4)
    kind = torch.float32 if kernels.INTERPRETED else torch.bfloat16
    x = torch.randn(tokens, hidden, device=device).to(kind)
    router, fc1, fc2 = (
        (torch.randn(*shape, device=device) / 10).to(kind)
        for shape in [(count, hidden), (count, 2 * width, hidden), (count, hidden, width)]
    )
    real = torch.tensor([max(1, tokens - 1)], dtype=torch.int32, device=device)
    chosen = choose_experts.choose(x, router, 2, real)
    logits = (x @ router.t()).float()
    top = logits.topk(2, dim=1)
    counted = int(real.item())
    same = chosen.experts[:counted].sort(1).values == top.indices[:counted].sort(1).values
    assert same.float().mean() > 0.98  # products in another order break ties of bf16 otherwise
    assert torch.all(chosen.experts[counted:] == -1)
    assert torch.allclose(chosen.probs[:counted].float().sum(1), torch.ones((), device=device), atol=1e-2)

    residual = torch.zeros_like(x)
    small_batch.add_and_norm(
        residual,
        small_batch.experts(x, chosen, choose_experts.sort(chosen, count), fc1, fc2),
        torch.ones_like(x[0]),
        1e-6,
    )
    expected = torch.zeros(tokens, hidden, dtype=torch.float64, device=device)
    for k in range(2):
        for t in range(counted):
            e = chosen.experts[t, k]
            gate, up = (fc1[e].double() @ x[t].double()).chunk(2)
            expected[t] += fc2[e].double() @ (torch.nn.functional.silu(gate) * up) * chosen.probs[t, k].double()
    assert float((residual.double() - expected).norm() / expected.norm()) < (1e-5 if kernels.INTERPRETED else 1e-2)
