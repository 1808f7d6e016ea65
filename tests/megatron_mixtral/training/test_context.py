"""A sequence split over context-parallel ranks has the losses and gradients of the whole one."""

import pytest
from finetunes import PLAIN, finetuned, finetuned_together, of_kind
from spawn_ranks import ranks

from megatron_mixtral.model import layers


def test_stretches_come_back_in_the_order_of_the_sequence():
    import torch

    for size in (1, 2, 4):
        last = 2 * size - 1
        by_rank = [number for rank in range(size) for number in (rank, last - rank)]
        ordered = layers._in_order(torch.tensor(by_rank), last)
        assert [int(part) for part in ordered] == list(range(2 * size))


def test_split_sequences_train_as_whole_ones(world, tmp_path):
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), "validation": 0.2, "eval_steps": 2}
    raw |= {"eval_interval": 1, "aux_loss": 0.5, "clip_grad": 0.0}
    whole = ranks(1, finetuned, raw, {"whole": {}}, str(tmp_path))[0]["whole"]
    split = {
        "split": {"layout": {"context": 2}},
        "experts": {"layout": {"context": 2, "expert": 2}},
        "odd": {"layout": {"context": 2}, "sequence_length": 30},
        "packed": {"layout": {"context": 2}, "packing": "documents"},
    }
    told = ranks(2, finetuned_together, raw, split, str(tmp_path))[0]
    for name in ("split", "experts"):
        for kind, field in (("step", "loss"), ("step", "grad_norm"), ("step", "aux_loss"), ("eval", "loss")):
            assert of_kind(told[name], kind, field) == pytest.approx(of_kind(whole, kind, field), abs=1e-5), field
    assert "sequence_length: 30 / (TP 1 x 2 x CP 2) = 7.5 isn't whole" in told["odd"]
    assert "packing: documents, but context 2 splits whole sequences" in told["packed"]
