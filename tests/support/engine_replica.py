"""A serving engine around a random model, by our forward pass or the engine's own, and the logits of its steps."""

import functools

import torch

from megatron_mixtral.spec.jobs import MixtralShape

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
