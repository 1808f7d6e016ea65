"""Our own engine and its forward pass beside megatron-core's: the same logits at every layout, in any company."""

import dataclasses

import pytest
import torch
from engine_replica import SHAPE, apart, logits_of_each_token, prompts_of, replica

from megatron_mixtral import kernels
from megatron_mixtral.spec.layout import Layout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]


def distances(shape, layout, lengths, tokens):
    """Of our logits and the engine's, for each token of prompts of these lengths."""
    ours, engines = (
        logits_of_each_token(replica(shape, layout, ours=o), prompts_of(lengths), tokens) for o in (True, False)
    )
    return apart(ours, engines)


def assert_small(apart):
    assert max(apart) < (1e-4 if kernels.INTERPRETED else 0.5), apart  # bf16 sends some tokens to other experts
    assert sorted(apart)[len(apart) // 2] < (1e-5 if kernels.INTERPRETED else 5e-2), apart


@pytest.mark.parametrize(("window", "tied"), [(None, False), (24, True)])
def test_logits_are_the_engines_own(window, tied):
    shape = dataclasses.replace(SHAPE, sliding_window=window, tie_word_embeddings=tied)
    assert_small(distances(shape, Layout(), (1, 33, 100, 64, 5, 17), tokens=6))  # more than run at once


LAYOUTS = {
    "pipeline": Layout(pipeline=2),
    "tensor": Layout(tensor=2, expert_tensor=2),
    "tensor, whole experts": Layout(tensor=2),
    "tensor and expert": Layout(tensor=2, expert=2),
    "expert": Layout(expert=2),
    "width of experts": Layout(expert_tensor=2),
}


def at_layout(shape, layout, lengths, tokens, most):
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.serve.engine import exchange

    exchange.MOST, exchange.MOST_WORDS = most, min(most, 2)
    ranks.initialize(layout)
    rank, _ = ranks.data_parallel()
    made = replica(shape, layout, ours=True)
    found = logits_of_each_token(made, prompts_of(lengths), tokens, first=7 * rank)
    told = answers(made, prompts_of(lengths), first=100 + 7 * rank)
    if made.engine.forward.replicas.count > 1:
        told |= beside_idle_ranks(made, rank)
    made.close()
    ranks.shutdown()
    return found, told


def beside_idle_ranks(made, rank):
    """What the first replica answers while the other one has nothing to do."""
    from megatron_mixtral.serve.messages import Request

    if rank == 0:
        made.add(Request(id=1000, prompt=[5, 6, 7], max_tokens=3, seed=0, temperature=0.0))
    told = []
    for _ in range(5):
        if rank:
            made.idle_step()
        else:
            told += [event.token for event in made.step()]
    assert not made.busy
    return {"alone": told}


def answers(made, prompts, first):
    """Tokens of each request, drawn on the device: the likeliest, or by chance."""
    from megatron_mixtral.serve.messages import Request

    del made.engine.sampler.choose
    told = {}
    for i, prompt in enumerate(prompts, first):
        by_chance = {"temperature": 1.0, "top_p": 0.9} if (i - first) % 2 else {"temperature": 0.0}
        made.add(Request(id=i, prompt=prompt, max_tokens=3 + (i - first) % 2, seed=(i - first), **by_chance))
    while made.busy:
        for event in made.step():
            told.setdefault(event.request - first, []).append((event.token, event.finish))
    return told


def tokens_of(made, prompt, count):
    from megatron_mixtral.serve.messages import Request

    made.add(Request(id=2000, prompt=prompt, max_tokens=count, seed=0, temperature=0.0))
    told = []
    while made.busy:
        told += [event.token for event in made.step()]
    return told


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="fewer than two GPUs")
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_make_the_logits_of_one(name):
    """With sums through peers' memory or, for half of the layouts, of more than a few tokens by collectives."""
    from spawn_ranks import ranks

    odd = list(LAYOUTS).index(name) % 2 == 1
    shape = dataclasses.replace(SHAPE, tie_word_embeddings=odd, vocab_size=511)
    lengths, tokens = (1, 70, 5), 2
    made = replica(shape, Layout(), ours=True)
    expected = logits_of_each_token(made, prompts_of(lengths), tokens)
    greedy = answers(made, prompts_of(lengths), first=100)
    found = ranks(
        2,
        at_layout,
        shape,
        LAYOUTS[name],
        lengths,
        tokens,
        6 if odd else 1024,
        timeout=100 if torch.cuda.is_available() else 280,
    )
    (first, its), (second, others) = found
    assert_small(apart(first, expected))
    assert_small(apart(second, expected))
    assert torch.equal(first, second) or "alone" in its  # replicas have batches of their own
    alone, none = its.pop("alone", None), others.pop("alone", None)
    assert not none
    assert its == others
    if kernels.INTERPRETED:
        assert its == greedy
        assert alone in (None, tokens_of(made, [5, 6, 7], 3))


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
