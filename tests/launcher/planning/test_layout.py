"""Layout arithmetic: what fits, and the equation that says why something doesn't."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import LayoutError
from launcher.planning.layout import SHAPES, Layout, Placement, known_shape, place

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


def test_nodes_are_filled_when_their_number_is_given():
    assert place(TRAIN, nodes=4, gpus=8).world == 32
    assert place(TRAIN, nodes=8, gpus=8).tasks_per_node == 8


def test_too_few_nodes_are_refused_with_those_that_fit():
    with pytest.raises(
        LayoutError, match=r"(?s)3 nodes x 8 GPUs = 24 ranks don't fit:.* DP = .*multiples of 4; nearest 4$"
    ):
        place(TRAIN, nodes=3, gpus=8)
    with pytest.raises(LayoutError, match=r"nearest 4 or 8$"):
        place(TRAIN, nodes=5, gpus=8)


def test_without_nodes_the_fewest_ranks_on_the_fewest_nodes():
    assert place(Layout(pipeline=2), nodes=None, gpus=8) == place(Layout(pipeline=2), nodes=None, gpus=0)
    twelve = place(Layout(tensor=4, pipeline=3), nodes=None, gpus=8)
    assert (twelve.nodes, twelve.tasks_per_node) == (2, 6)


def test_one_machine_has_one_node():
    with pytest.raises(LayoutError, match="one machine"):
        place(Layout(), nodes=2, gpus=0)


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (Layout(expert=3), "experts / EP = 8 / 3"),
        (Layout(pipeline=33), "layers / PP = 32 / 33 leaves stages without a layer"),
        (Layout(tensor=16), "query groups / TP = 8 / 16"),
        (Layout(expert_tensor=5), "expert width / ETP = 14336 / 5"),
    ],
)
def test_a_model_is_cut_whole(layout, said):
    with pytest.raises(LayoutError, match=said):
        SHAPES["8x7B"].check(layout)


def test_layers_need_not_divide_evenly():
    SHAPES["8x7B"].check(Layout(pipeline=5))
    assert SHAPES["8x7B"].stages(5) == (7, 7, 6, 6, 6)


@pytest.mark.parametrize(
    ("tasks", "size", "nvlink", "islands"),
    [
        (8, 8, 8, 1),  # an EP group is a node
        (8, 8, 4, 2),  # two NVLink domains in a node
        (4, 8, 4, 2),  # four GPUs a node
        (4, 8, 8, 1),  # NVLink over two nodes
        (4, 8, 72, 1),
        (8, 2, 4, 1),
        (6, 4, 6, 2),  # groups of four on nodes of six
    ],
)
def test_a_group_of_neighbours_may_leave_its_nvlink_domain(tasks, size, nvlink, islands):
    assert Placement(nodes=48 // tasks, tasks_per_node=tasks).islands(size, nvlink) == islands


def test_published_models_are_known_by_name():
    assert known_shape("mistralai/Mixtral-8x7B-Instruct-v0.1") is SHAPES["8x7B"]
    assert known_shape("mistralai/Mixtral-8x22B-v0.1") is SHAPES["8x22B"]
    assert known_shape("me/other") is None
