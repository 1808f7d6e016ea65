"""Ranks over nodes: the fewest that a layout needs, and which groups leave an NVLink domain."""

import pytest

from launcher.errors import LayoutError
from launcher.planning.layout import Placement, place
from megatron_mixtral.spec.layout import Layout

TRAIN = Layout(pipeline=4, expert=8)


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
