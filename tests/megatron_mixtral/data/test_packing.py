"""Conversations share a sequence and see nothing of each other: every token has the loss it has alone."""

import itertools
import json

import numpy as np
import pytest
from finetunes import finetuned, of_kind, raw_config
from prepared_data import write_chats
from small_world import SHAPE, make_weights
from spawn_ranks import ranks

from megatron_mixtral.data.packing import PackedSamples, best_fit
from megatron_mixtral.errors import InputError

LENGTHS = [5, 1, 30, 12, 7, 0, 45, 3, 18, 9]


@pytest.fixture
def chats(tmp_path):
    return write_chats(tmp_path / "chats", LENGTHS, learnt=0.9)


@pytest.mark.parametrize("share", [True, False])
def test_an_epoch_predicts_every_token_of_every_document_once(chats, share):
    packed = PackedSamples(chats, np.arange(len(chats)), 16, seed=3, share=share)
    for epoch in range(2):
        seen = []
        for number in range(packed.per_epoch):
            sample = packed.sample(epoch * packed.per_epoch + number)
            assert sum(sample.lengths) == 16
            for begin, end in itertools.pairwise(np.cumsum([0, *sample.lengths])):
                ids, labels, mask = (x[begin:end].tolist() for x in (sample.ids, sample.labels, sample.mask))
                if any(ids + mask):
                    assert labels[:-1] == ids[1:]
                    seen += zip(ids, labels, mask, strict=True)
        wanted = []
        for index in range(len(chats)):
            ids, mask = (part.tolist() for part in chats.read(index, 0, None))
            wanted += list(zip(ids, ids[1:], mask[1:], strict=False))
        assert sorted(seen) == sorted(wanted)
    assert packed.cut == 4  # 29, 44 and 17 places are two, three and two pieces
    assert packed.waste == pytest.approx(1 - sum(max(n - 1, 0) for n in LENGTHS) / (16 * packed.per_epoch))


def test_what_teaches_nothing_is_left_out(tmp_path):
    """Of long documents whose last word alone is learnt, every part but the last; all that is learnt stays."""
    chats = write_chats(tmp_path / "chats", [40, 17, 18, 6, 33, 1, 34], learnt=0.01)
    everything = np.arange(len(chats))
    packed = PackedSamples(chats, everything, 16, seed=1)
    samples = [packed.sample(n) for n in range(packed.per_epoch)]
    assert sum(int(s.mask.sum()) for s in samples) == 6
    assert all(s.mask.any() for s in samples)
    assert packed.left_out == 2 + 0 + 1 + 0 + 1 + 2  # 39, 16, 17, 5, 32 and 33 places
    assert sorted(packed._places) == [1, 1, 5, 7, 16, 16]


def test_packing_is_tight_and_repeats(chats):
    random = np.random.default_rng(1)
    sizes = random.integers(1, 400, 5000)
    bins = best_fit(sizes, 512)
    assert sorted(i for b in bins for i in b) == list(range(5000))
    assert all(sizes[b].sum() <= 512 for b in bins)
    assert len(bins) <= -(-sizes.sum() // 512) * 1.02
    one, same, other = (PackedSamples(chats, np.arange(10), 16, seed=s) for s in (3, 3, 4))
    numbers = range(2 * one.per_epoch)
    assert all((one.sample(n).ids == same.sample(n).ids).all() for n in reversed(numbers))
    assert any((one.sample(n).ids != other.sample(n).ids).any() for n in numbers)


def test_documents_of_one_token_are_nothing_to_learn_from(tmp_path):
    documents = write_chats(tmp_path / "ones", [1, 1, 1])
    with pytest.raises(InputError, match="no document has two tokens or more"):
        PackedSamples(documents, np.arange(3), 16, seed=1)


def test_packed_and_unpacked_losses_are_the_same(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**SHAPE, "initializer_range": 0.4}))  # attention matters
    ranks(1, make_weights, tmp_path)
    random = np.random.default_rng(2)
    write_chats(tmp_path / "chats", random.integers(4, 60, 40))
    raw = raw_config(tmp_path, tmp_path / "chats")
    variants = {"documents": {}, "none": {"packing": "none"}, "stream": {"packing": "stream"}}
    told = ranks(1, finetuned, raw, variants, str(tmp_path))[0]
    losses = {name: of_kind(events, "eval", "loss")[0] for name, events in told.items()}
    assert losses["documents"] == pytest.approx(losses["none"], abs=1e-5)
    assert losses["stream"] != pytest.approx(losses["none"], abs=0.01), "this comparison can tell nothing"


def test_the_balancing_loss_weighs_the_same_whatever_share_is_learnt(world, tmp_path):
    """With next to nothing to learn, the gradient's norm is the balancing loss's: alike for 1 in 2 and 1 in 8."""
    norms = {}
    for name, learnt in (("half", 0.5), ("eighth", 0.125)):
        write_chats(tmp_path / name, [65] * 20, learnt)
        raw = raw_config(world, tmp_path / name, packing="documents", aux_loss=1e4, clip_grad=0.0, steps=1)
        norms[name] = of_kind(ranks(1, finetuned, raw, {name: {}}, str(tmp_path))[0][name], "step", "grad_norm")[0]
    assert norms["half"] == pytest.approx(norms["eighth"], rel=1e-3)
