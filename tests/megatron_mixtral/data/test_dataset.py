"""Which tokens a step sees: everything once an epoch, the same on any layout, from any starting point."""

import itertools

import numpy as np
import pytest

from megatron_mixtral.data import indexed
from megatron_mixtral.data.dataset import Documents, Samples, numbers, split
from megatron_mixtral.errors import InputError

LENGTHS = [5, 1, 30, 12, 7, 7, 45, 3, 18, 9]


@pytest.fixture
def prefix(tmp_path):
    """Ten documents whose tokens are all different: 0, 1, 2 ..."""
    lengths = np.array(LENGTHS, dtype=np.int32)
    np.arange(lengths.sum(), dtype=np.uint16).tofile(tmp_path / "d.bin")
    indexed.write_index(tmp_path / "d.idx", lengths, np.dtype(np.uint16))
    return tmp_path / "d"


def all_documents(prefix):
    documents = Documents(prefix)
    return documents, np.arange(len(documents))


def test_an_epoch_predicts_every_token_of_the_stream_once(prefix):
    documents, chosen = all_documents(prefix)
    samples = Samples(documents, chosen, sequence_length=8, seed=3)
    for epoch in range(3):
        seen = [samples[epoch * samples.per_epoch + i][0] for i in range(samples.per_epoch)]
        assert all(len(s) == 9 for s in seen)
        targets = np.concatenate([s[1:] for s in seen])
        assert len(set(targets)) == len(targets) == samples.per_epoch * 8


def test_documents_stay_whole_and_in_order_inside(prefix):
    documents, chosen = all_documents(prefix)
    samples = Samples(documents, chosen, sequence_length=sum(LENGTHS) - 1, seed=3)
    stream = samples[0][0]
    starts = set(np.cumsum(LENGTHS) - LENGTHS)
    for before, after in itertools.pairwise(stream):
        assert after == before + 1 or after in starts


def test_epochs_and_seeds_differ_and_repeat(prefix):
    documents, chosen = all_documents(prefix)
    one = Samples(documents, chosen, 8, seed=3)
    same = Samples(documents, chosen, 8, seed=3)
    other = Samples(documents, chosen, 8, seed=4)
    numbers_ = range(3 * one.per_epoch)
    assert all(np.array_equal(one[i][0], same[i][0]) for i in reversed(numbers_))
    assert any(not np.array_equal(one[i][0], other[i][0]) for i in numbers_)
    assert any(not np.array_equal(one[i][0], one[i + one.per_epoch][0]) for i in range(one.per_epoch))


@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_a_step_holds_the_same_micro_batches_on_any_number_of_replicas(replicas):
    step = [numbers(48, global_batch=16, micro_batch=2, rank=r, replicas=replicas) for r in range(replicas)]
    micro = sorted(m for rank in step for m in rank)
    assert micro == [[48 + 2 * i, 49 + 2 * i] for i in range(8)]


def test_split_is_of_whole_documents_and_repeats():
    one = split(1000, 0.01, seed=1)
    assert len(one.validation) == 10
    assert sorted([*one.train, *one.validation]) == list(range(1000))
    assert np.array_equal(one.validation, split(1000, 0.01, seed=1).validation)
    assert not np.array_equal(one.validation, split(1000, 0.01, seed=2).validation)
    assert len(split(3, 0.01, seed=1).validation) == 1
    assert len(split(3, 0, seed=1).validation) == 0
    assert len(split(1, 0.5, seed=1).validation) == 0


def test_data_shorter_than_a_sequence_is_named(prefix):
    documents, chosen = all_documents(prefix)
    with pytest.raises(InputError, match="137 tokens in 10 documents are less than one sequence of 200"):
        Samples(documents, chosen, sequence_length=200, seed=1)


def test_the_mask_travels_with_the_tokens(prefix):
    mask = (np.arange(sum(LENGTHS)) % 3 == 0).astype(np.uint8)
    mask.tofile(f"{prefix}_mask.bin")
    indexed.write_index(prefix.with_name("d_mask.idx"), np.array(LENGTHS, dtype=np.int32), np.dtype(np.uint8))
    documents, chosen = all_documents(prefix)
    samples = Samples(documents, chosen, 8, seed=3)
    for i in range(samples.per_epoch):
        ids, learnt = samples[i]
        assert np.array_equal(learnt, ids % 3 == 0)


def test_damaged_files_are_named(prefix):
    with pytest.raises(InputError, match=r"nothing\.idx: no such file"):
        Documents(prefix.with_name("nothing"))
    whole = prefix.with_suffix(".bin").read_bytes()
    prefix.with_suffix(".bin").write_bytes(whole[:-2])
    with pytest.raises(InputError, match=r"d\.bin: 272 bytes, but .*d\.idx counts 274"):
        Documents(prefix)
    prefix.with_suffix(".idx").write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"d\.idx: not an index"):
        Documents(prefix)


def test_padding_makes_a_sample_of_the_rest_and_of_few_documents(prefix):
    documents, chosen = all_documents(prefix)
    samples = Samples(documents, chosen, sequence_length=100, seed=3, pad=True)
    assert samples.per_epoch == 2
    assert sorted(samples[i][1][1:].sum() for i in range(2)) == [36, 100]
    few = Samples(documents, chosen[:2], sequence_length=100, seed=3, pad=True)
    ids, mask = few[0]
    assert few.per_epoch == 1
    assert sorted(ids[:6]) == list(range(6))
    assert mask.tolist() == [1] * 6 + [0] * 95
