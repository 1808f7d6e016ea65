"""Our own forward pass for the serving engine beside the engine's: the same logits, in any company."""

import dataclasses
import functools
import random

import pytest
import torch

from megatron_mixtral import kernels
from megatron_mixtral.spec.jobs import Layout, MixtralShape

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("one_rank")]
SHAPE = MixtralShape(
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    num_local_experts=4,
    num_experts_per_tok=2,
    vocab_size=512,
    rope_theta=1e4,
)


def replica(shape, layout, *, ours, in_fp8=False):
    """Of a random model, the same in the GPU's own precision and with experts in FP8."""
    from megatron_mixtral.mcore import cpu
    from megatron_mixtral.model import build, fp8
    from megatron_mixtral.serve.engine import forward
    from megatron_mixtral.serve.engine.replica import Replica, Sizes

    precision = "bf16" if cpu.HAVE_GPU else "fp32"
    built = build.build(shape, layout, precision=precision, random_weights=False, fuse=False, fp8_experts=in_fp8)
    experts = [layer.mlp.experts for layer in built.decoder.layers]
    scales = {w: s for e in experts for w, s in zip((e.linear_fc1, e.linear_fc2), e.scales, strict=True)}
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in built.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            values = 1 + values / 10 if parameter.ndim == 1 else values / 8
            if scales.get(parameter) is None:
                parameter.copy_(values)
            else:
                fp8.quantize(values.to(parameter.device), parameter, scales[parameter])
    assert forward.missing(built) is None
    made = Replica(built, Sizes(requests=4, context_tokens=160, step_tokens=64, page=64))
    made._controller.step = (
        (made._controller.step or filled_up(forward.Step(built, made._engine.context))) if ours else None
    )
    return made


class Uncaptured:
    """In place of a CUDA graph, where there is no GPU: the same call again."""

    def __init__(self, *call):
        self.replay = functools.partial(*call)


def filled_up(made):
    """Batches filled up as they are for graphs, over whatever lay in memory before."""
    from megatron_mixtral.serve.engine import forward

    most = made.context.max_requests
    for memory in (made.logits, made.context.memory_buffer):
        memory.fill_(float("nan"))
    made.prompt_graphs = {
        n: Uncaptured(made._prompts, n, most) for n in forward.PROMPT_SIZES if n <= made.context.max_tokens
    }
    made.graphs = {n: Uncaptured(made._decode, n) for n in forward.graph_sizes(most)}
    return made


def logits_of_each_step(made, prompts, tokens):
    """Of every step of all requests at once; the drawn tokens are forced, so that roundings don't part the ways."""
    from megatron_mixtral.serve.engine.sampling import Choice
    from megatron_mixtral.serve.messages import Request

    controller, seen = made._controller, []

    def choose(logits, requests):
        seen.append((list(requests), logits.float().cpu().clone()))
        return [Choice((31 * r + 7 * len(seen)) % 512) for r in requests]

    controller.sampler.choose = choose
    for i, prompt in enumerate(prompts):
        made.add(Request(id=i, prompt=prompt, max_tokens=tokens + i, seed=0, temperature=0.0))
    while made.busy:
        made.step()
    return seen


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
