"""Small replicas with equal random weights at every layout, and the logits that their engines have of prompts."""

import functools
import random

import torch

from megatron_mixtral.spec.shape import MixtralShape

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
    """Of a random model, the same at every layout, in the GPU's own precision and with experts in FP8."""
    from megatron_mixtral.mcore import cpu
    from megatron_mixtral.model import build
    from megatron_mixtral.serve.engine import replica as serving

    precision = "bf16" if cpu.HAVE_GPU else "fp32"
    built = build.build(shape, layout, precision=precision, random_weights=False, fuse=False, fp8_experts=in_fp8)
    fill(built)
    assert serving.missing(built) is None
    sizes = serving.Sizes(requests=4, context_tokens=160, step_tokens=64, page=64)
    made = serving.Replica(built, sizes, ours=ours)
    if ours and not cpu.HAVE_GPU:
        filled_up(made.engine.forward)
    return made


@torch.no_grad()
def fill(built):
    """Values that depend on a parameter's name alone; this rank's part of them."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.model import fp8

    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, extract_matching_values
    from megatron.core.dist_checkpointing.mapping import (
        ShardedTensor,
        ShardedTensorFactory,
        apply_factories,
        apply_factory_merges,
    )

    state = save_load.weights_wanted(built)
    factories, _ = extract_matching_values(
        state, lambda value: isinstance(value, ShardedTensorFactory), return_lists_as_dicts=True
    )
    apply_factories(state)

    def put(shard):
        if isinstance(shard, ShardedTensor):
            whole = values_of(shard.key, shard.global_shape)
            cut = [slice(at, at + size) for at, size in zip(shard.global_offset, whole.shape, strict=True)]
            local = shard.data.shape
            sizes = [1] * (len(cut) - len(local)) + list(local)
            own = whole[tuple(slice(c.start, c.start + n) for c, n in zip(cut, sizes, strict=True))].reshape(local)
            if (scale := getattr(shard, "scales", None)) is None:
                shard.data.copy_(own)
            else:
                fp8.quantize(own.to(shard.data.device), shard.data, scale)
            return shard.data
        return shard

    dict_list_map_inplace(put, state)
    save_load.fill(built, apply_factory_merges(state, factories), None)


def values_of(key, shape):
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    values = torch.randn(*shape, generator=generator)
    return 1 + values / 10 if "norm" in key else values / 8


class Uncaptured:
    """In place of a CUDA graph, where there is no GPU: the same call again."""

    def __init__(self, *call):
        self.replay = functools.partial(*call)


def filled_up(step):
    """Batches filled up as they are for graphs, over whatever lay in memory before."""
    from megatron_mixtral.serve.engine import forward

    most = step.batch.requests
    for memory in (step.logits, step.cache):
        memory.fill_(float("nan"))
    step.prompt_graphs = {
        n: Uncaptured(step._prompts, n, most) for n in forward.PROMPT_SIZES if n <= step.batch.tokens
    }
    step.graphs = {n: Uncaptured(step._decode, n) for n in forward.graph_sizes(most)}


def logits_of_each_token(made, prompts, tokens, first=0):
    """Of every request; the drawn tokens are forced, so that roundings don't part the ways."""
    from megatron_mixtral.serve.engine.sampling import Choice
    from megatron_mixtral.serve.messages import Request

    seen = {}

    def choose(logits, requests):
        for r, row in zip(requests, logits.float().cpu(), strict=True):
            seen.setdefault(r, []).append(row.clone())
        return [Choice((31 * (r - first) + 7 * len(seen[r])) % 511) for r in requests]

    made.engine.sampler.choose = choose
    for i, prompt in enumerate(prompts, first):
        made.add(Request(id=i, prompt=prompt, max_tokens=tokens + (i - first), seed=0, temperature=0.0, logprobs=0))
    while made.busy:
        made.step()
    assert {r: len(rows) for r, rows in seen.items()} == {
        i: tokens + i % 7 for i in range(first, first + len(prompts))
    }
    return torch.cat([torch.stack(seen[r]) for r in sorted(seen)])


def prompts_of(lengths):
    draw = random.Random(1)
    return [[draw.randrange(511) for _ in range(n)] for n in lengths]


def apart(ours, others):
    return ((ours - others).norm(dim=1) / others.norm(dim=1)).tolist()
