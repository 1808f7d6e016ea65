"""The layers' parts by themselves: masks, decoding, experts without tokens."""

import pytest
from spawn_ranks import ranks


def attention_errors():
    """Largest differences of the attention from softmax written out, for whole sequences, decoding and windows."""
    import torch

    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model.build import transformer_config
    from megatron_mixtral.model.layers import Attention
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape

    def written_out(q, k, v, window):
        keys, queries = k.shape[0], q.shape[0]
        k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) / q.shape[-1] ** 0.5
        for i in range(queries):
            at = keys - queries + i
            scores[:, :, i, at + 1 :] = -torch.inf
            if window:
                scores[:, :, i, : max(at - window + 1, 0)] = -torch.inf
        return torch.einsum("bnst,tbnd->sbnd", scores.softmax(-1), v).flatten(2)

    ranks.initialize(Layout())
    off = {}
    for window in (None, 3, 100):
        shape = MixtralShape(
            num_hidden_layers=1,
            hidden_size=32,
            intermediate_size=32,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            num_local_experts=2,
            num_experts_per_tok=2,
            vocab_size=8,
            sliding_window=window,
        )
        attention = Attention(transformer_config(shape, Layout(), precision="fp32", aux_loss=0.0)).eval()
        for queries, keys in ((9, 9), (1, 9), (4, 9), (1, 1)):
            q = torch.randn(queries, 2, 4, 8)
            k, v = torch.randn(2, keys, 2, 2, 8)
            off[window, queries, keys] = float((attention(q, k, v) - written_out(q, k, v, window)).abs().max())
    ranks.shutdown()
    return off


def test_attention_is_causal_from_the_end_and_keeps_to_its_window():
    off = ranks(1, attention_errors)[0]
    assert len(off) == 12
    assert max(off.values()) < 1e-5, off


def experts_with(counts):
    """Output and gradients of four experts given `counts` tokens each, and those of the formula."""
    import torch

    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape

    ranks.initialize(Layout())
    shape = MixtralShape(
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=12,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=8,
    )
    experts = build.build(shape, Layout(), precision="fp32").decoder.layers[0].mlp.experts
    x, probs = torch.randn(sum(counts), 8), torch.rand(sum(counts))
    out, bias = experts(x, torch.tensor(counts), probs)
    assert bias is None
    out.sum().backward()
    wanted = []
    for expert, rows in enumerate(torch.arange(sum(counts)).split(counts)):
        gate, up = (x[rows] @ experts.linear_fc1[expert].t()).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up * probs[rows, None]
        wanted.append(inner @ experts.linear_fc2[expert].t())
    ranks.shutdown()
    idle = [i for i, count in enumerate(counts) if not count]
    gradients = [w.grad[idle].abs().sum().item() for w in (experts.linear_fc1, experts.linear_fc2)]
    return out.shape, float((out - torch.cat(wanted)).abs().sum()), gradients


@pytest.mark.parametrize("counts", [[3, 0, 5, 1], [0, 0, 0, 7], [0, 0, 0, 0]])
def test_experts_may_get_no_tokens_and_still_have_gradients(counts):
    shape, error, gradients = ranks(1, experts_with, counts)[0]
    assert tuple(shape) == (sum(counts), 8)
    assert error < 1e-5
    assert gradients == [0.0, 0.0]
