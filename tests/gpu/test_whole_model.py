"""A whole small model with our kernels beside the plain one with the same weights."""

import dataclasses

import pytest
import torch

from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.lora import Lora

pytestmark = pytest.mark.gpu
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
)
CONFIG = FinetuneConfig(model="", data="", global_batch=1, warmup_steps=1, steps=100, lr=1e-3)


@pytest.fixture(autouse=True)
def _one_rank(device):
    from megatron_mixtral.mcore import ranks

    ranks.initialize(Layout())
    yield
    ranks.shutdown()


LORAS = [None, Lora(rank=8, alpha=16), Lora(rank=8, alpha=16, experts=True)]


def pair(precision, lora=None):
    """Ours and the plain model, with the same weights."""
    from megatron_mixtral.model import build

    ours, plain = (
        build.build(SHAPE, Layout(), precision=precision, aux_loss=1e-2, fuse=f, lora=lora) for f in (True, False)
    )
    for name, parameter in plain.named_parameters():
        if "lora_B" in name:  # zero at first, which would hide the other half
            torch.nn.init.normal_(parameter, std=0.02)
    for name, value in plain.state_dict().items():
        if value is not None:
            ours.state_dict()[name].copy_(value)
    return ours, plain


def batch(device, rows=2, length=24):
    ids = torch.randint(512, (rows, length + 1), device=device)
    return {
        "input_ids": ids[:, :-1],
        "position_ids": torch.arange(length, device=device).expand(rows, -1),
        "attention_mask": None,
        "labels": ids[:, 1:],
    }


def distance(ours, exact):
    return float((ours.detach().double() - exact.detach().double()).norm() / exact.detach().double().norm())


@pytest.mark.parametrize("lora", LORAS, ids=["whole", "attention", "experts"])
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (2, 24), (3, 7)])
def test_losses_and_gradients_are_the_plain_models(rows, length, lora, device):
    ours, plain = pair("fp32", lora)
    inputs = batch(device, rows, length)
    losses = [m(**inputs) for m in (ours, plain)]
    assert distance(*losses) < 1e-5
    for each in losses:
        each.sum().backward()
    gradients = dict(plain.named_parameters())
    for name, parameter in ours.named_parameters():
        assert parameter.requires_grad == (lora is None or "lora_" in name)
        if not parameter.requires_grad:
            assert parameter.grad is None
        elif gradients[name].grad.norm() > 1e-6:  # a single token asks nothing of adapters of queries and keys
            assert distance(parameter.grad, gradients[name].grad) < 1e-4, name


@pytest.mark.parametrize("lora", LORAS, ids=["whole", "attention", "experts"])
def test_training_in_bf16_follows_the_plain_model(lora, device):
    from megatron_mixtral.training import optimizer

    inputs = batch(device)
    curves = []
    for each in pair("bf16", lora):
        parts = optimizer.build(CONFIG, each)
        curve = []
        for step in range(1, 6):
            optimizer.zero_grad(parts)
            optimizer.set_step(parts, step)
            loss = parts.chunks[0](**inputs).float().mean()
            loss.backward()
            parts.chunks[0].finish_grad_sync()
            updated, norm = optimizer.step(parts)
            assert updated
            curve.append((float(loss), norm))
        curves.append(torch.tensor(curve))
    assert curves[0][-1, 0] < curves[0][0, 0] - (0.01 if lora else 0.1)
    ours, plain = curves
    assert torch.allclose(ours[:, 0], plain[:, 0], rtol=2e-2)
    assert torch.allclose(ours[:, 1], plain[:, 1], rtol=1e-1)  # routing tips over


def test_our_update_and_gradients_are_in_use(device):
    from megatron_mixtral.kernels.adam import FusedAdamW
    from megatron_mixtral.training import optimizer

    ours, _ = pair("bf16")
    parts = optimizer.build(dataclasses.replace(CONFIG), ours)
    assert all(type(part.optimizer) is FusedAdamW for part in parts.optimizer.chained_optimizers)
    parts.chunks[0](**batch(device)).float().mean().backward()
    added = {n for n, p in ours.named_parameters() if p.grad_added_to_main_grad}
    assert {n.split(".")[-1] for n in added} >= {"linear_fc1", "linear_fc2"}
    assert any("linear_qkv" in n for n in added)
