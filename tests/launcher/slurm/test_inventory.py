"""What other clusters' Slurms say about themselves, read: shapes that the sandbox can't take on."""

import pytest

from launcher.cluster import discover
from launcher.slurm import inventory

PARTITIONS = """
PartitionName=boost AllowGroups=ALL AllowAccounts=nlp,vision AllowQos=normal,high AllocNodes=ALL Default=YES \
QoS=boost DefaultTime=00:30:00 MaxNodes=64 MaxTime=1-00:00:00 Nodes=n[0001-3456] OverSubscribe=EXCLUSIVE State=UP \
TotalNodes=3456
PartitionName=debug DenyAccounts=guest AllowQos=ALL Default=NO DefaultTime=NONE MaxTime=UNLIMITED \
OverSubscribe=FORCE:4 State=DRAIN TotalNodes=2
"""


def test_partitions():
    boost, debug = inventory.partitions(PARTITIONS)
    assert (boost.name, boost.default, boost.state, boost.nodes) == ("boost", True, "UP", 3456)
    assert (boost.minutes, boost.whole_nodes) == (1440, True)
    assert (boost.accounts, boost.denied, boost.qos) == (("nlp", "vision"), (), ("normal", "high"))
    assert (debug.minutes, debug.whole_nodes, debug.state) == (None, False, "DRAIN")
    assert (debug.accounts, debug.denied, debug.qos) == ((), ("guest",), ())
    assert list(inventory.partitions("No partitions in the system\n")) == []


@pytest.mark.parametrize(
    ("gres", "gpus", "kind"),
    [
        ("gpu:8", 8, ""),
        ("gpu:a100:8(S:0-7)", 8, "a100"),
        ("gpu:H100:4(S:0),gpu:H100:4(S:1)", 8, "h100"),
        ("gpu:nvidia_h100_80gb_hbm3:8", 8, "nvidia_h100_80gb_hbm3"),
        ("gpu:a100_3g.20gb:2,gpu:a100_1g.5gb:7", 9, "a100_3g.20gb"),
        ("craynetwork:4,gpu:gh200:4,nvme:1", 4, "gh200"),
        ("(null)", 0, ""),
        ("nvme:1", 0, ""),
    ],
)
def test_kinds_of_gpus(gres, gpus, kind):
    (found,) = inventory.kinds(f"gpu|12|{gres}|256+|1031000|mixed|a100,ib\n")
    assert (found.partition, found.nodes, found.gpus, found.gpu_type) == ("gpu", 12, gpus, kind)
    assert (found.cpus, found.memory_gb, found.usable) == (256, 1006, True)
    assert found.features == {"a100", "ib"}


@pytest.mark.parametrize(
    ("state", "usable"),
    [("idle", True), ("allocated", True), ("idle~", True), ("down*", False), ("draining", False), ("maint", True)],
)
def test_nodes_that_are_gone(state, usable):
    (found,) = inventory.kinds(f"gpu|1|gpu:8|64|512000|{state}|(null)\n")
    assert found.usable is usable
    assert found.features == frozenset()


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("1:30:00", 90),
        ("1-0", 1440),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:00", 2880),
    ],
)
def test_limits_in_minutes(limit, minutes):
    assert inventory.minutes(limit) == minutes


@pytest.mark.parametrize(
    ("gpu_type", "memory"),
    [("nvidia_h100_80gb_hbm3", 80), ("h100", 80), ("a100", None), ("", None), ("nvidia_a100-sxm4-40gb", 40)],
)
def test_a_gpus_memory_is_told_by_its_type_or_not_at_all(gpu_type, memory):
    assert discover._gpu_memory(gpu_type) == memory
