"""The table of links: a bijection of rows, and the one that megatron-core and transformers mean."""

from collections import defaultdict
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights.tensors import Names, Rows, hub_shapes, links, megatron_axes, row_width
from megatron_mixtral.weights.tensors import shapes as megatron_shapes

NAMES = (Names(), Names(fused=True), Names(block="mlp", fused=True))


@st.composite
def shapes(draw):
    kv = draw(st.sampled_from([1, 2, 3]))
    return MixtralShape(
        num_hidden_layers=draw(st.integers(1, 5)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 9)),
        num_attention_heads=kv * draw(st.integers(1, 3)),
        num_key_value_heads=kv,
        head_dim=draw(st.integers(1, 5)),
        num_local_experts=draw(st.integers(1, 5)),
        num_experts_per_tok=1,
        vocab_size=draw(st.integers(1, 50)),
        tie_word_embeddings=draw(st.booleans()),
    )


def planes(all_shapes, axes):
    """(name, index) -> (rows, elements in a row) of every plane."""
    for name, shape in all_shapes.items():
        for index in product(*map(range, shape[: axes(name)])):
            yield (name, index), (shape[axes(name)], row_width(shape, axes(name)))


@settings(max_examples=60, deadline=None)
@given(shape=shapes(), names=st.sampled_from(NAMES))
def test_every_row_is_linked_once_on_both_sides_and_keeps_its_width(shape, names):
    hub = dict(planes(hub_shapes(shape, names), lambda n: 1 if n.endswith("_proj") else 0))
    megatron = dict(planes(megatron_shapes(shape), megatron_axes))
    found = {"hub": defaultdict(list), "megatron": defaultdict(list)}
    for link in links(shape, names):
        assert len(link.hub) == len(link.megatron)
        assert hub[link.hub.name, link.hub.index][1] == megatron[link.megatron.name, link.megatron.index][1]
        for side in found:
            rows: Rows = getattr(link, side)
            found[side][rows.name, rows.index].extend(range(rows.start, rows.stop))
    # In order as well: a digest of a hub tensor can be taken while Megatron's is being written.
    assert found["hub"] == {plane: list(range(rows)) for plane, (rows, _) in hub.items()}
    assert found["megatron"] == {plane: list(range(rows)) for plane, (rows, _) in megatron.items()}


@pytest.mark.parametrize("names", NAMES)
def test_a_folder_tells_its_names(names):
    shape = MixtralShape(
        num_hidden_layers=1,
        hidden_size=8,
        intermediate_size=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        num_local_experts=2,
        num_experts_per_tok=1,
        vocab_size=9,
    )
    assert Names.found_in(hub_shapes(shape, names)) == names
    assert Names.found_in(["model.norm.weight"]) == Names()
