"""Layout arithmetic: what fits, and the equation that says why something doesn't."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixtral.errors import LayoutError
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import PUBLISHED, published

TRAIN = Layout(pipeline=4, expert=8)
SIZES = st.sampled_from([1, 2, 3, 4, 8])


def test_the_training_preset_stands_on_32_ranks():
    assert TRAIN.unit == 32
    assert TRAIN.data_parallel(64) == 16
    assert TRAIN.describe(32) == "32 ranks = TP1 x PP4 x CP1 x DP8, experts EP8 x ETP1"


def test_a_world_that_does_not_fit_gets_the_whole_equation():
    with pytest.raises(LayoutError) as caught:
        TRAIN.data_parallel(24)
    message = str(caught.value)
    assert "DP = 24 / (TP 1 x PP 4 x CP 1) = 6" in message
    assert "expert DP = 24 / (ETP 1 x EP 8 x PP 4) = 0.75, not whole" in message
    assert "Nearest that fit: 32 ranks" in message


@given(
    st.builds(Layout, tensor=SIZES, pipeline=SIZES, expert=SIZES, expert_tensor=SIZES, context=SIZES),
    st.integers(1, 300),
)
def test_a_world_fits_exactly_when_both_quotients_are_whole(layout, world):
    # The two conditions of megatron-core's parallel_state, written out.
    model = layout.tensor * layout.pipeline * layout.context
    expert = layout.expert_tensor * layout.expert * layout.pipeline
    fits = world % model == 0 and world % expert == 0
    try:
        assert layout.data_parallel(world) * model == world
    except LayoutError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(expert=3), "experts / EP = 8 / 3"),
        (Layout(pipeline=33), "layers / PP = 32 / 33 leaves stages without layers"),
        (Layout(tensor=16), "query groups / TP = 8 / 16"),
        (Layout(expert_tensor=5), "expert width / ETP = 14336 / 5"),
    ],
)
def test_a_model_is_cut_whole(layout, said):
    with pytest.raises(LayoutError, match=said):
        layout.check(PUBLISHED["8x7B"])


def test_layers_need_not_divide_evenly():
    Layout(pipeline=5).check(PUBLISHED["8x7B"])
    assert Layout(pipeline=5).stages(32) == (7, 7, 6, 6, 6)


def test_published_models_are_known_by_name():
    assert published("mistralai/Mixtral-8x7B-Instruct-v0.1") is PUBLISHED["8x7B"]
    assert published("mistralai/Mixtral-8x22B-v0.1") is PUBLISHED["8x22B"]
    assert published("me/other") is None
