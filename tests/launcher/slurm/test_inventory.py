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
        ("gpu:H100:4(S:0),gpu:H100:4(S:1)", 8, "H100"),
        ("gpu:nvidia_h100_80gb_hbm3:8", 8, "nvidia_h100_80gb_hbm3"),
        ("gpu:a100_3g.20gb:2,gpu:a100_1g.5gb:7", 2, "a100_3g.20gb"),
        ("gpu:2080ti:4(S:0-1)", 4, "2080ti"),
        ("gpu:3090:4", 4, "3090"),
        ("gpu:1080ti", 1, "1080ti"),
        ("gpu:3", 3, ""),
        ("gpu", 1, ""),
        ("gpu:1g.10gb:56(S:0-1)", 56, "1g.10gb"),
        ("gpu:2g.20gb:12,gpu:a100l:4", 4, "a100l"),
        ("gpu:a100l:4(S:0,1),gpu:2g.20gb:12(S:0,1)", 4, "a100l"),
        ("gpu:v100:2,gpu:A100:4", 4, "A100"),
        ("gpu:tesla:no_consume:4", 4, "tesla"),
        ("shard:a100:8,gpu:a100:4", 4, "a100"),
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


def test_other_gpus_of_the_same_nodes_are_kept_apart():
    (found,) = inventory.kinds("gpu|2|gpu:2g.20gb:12,gpu:a100l:4|64|1024000|mixed|(null)\n")
    assert found.counted == (("a100l", 4), ("2g.20gb", 12))
    assert not found.is_slice
    assert inventory.gpus("gpu:H100:4,gpu:h100:4") == {"H100": 4, "h100": 4}


NODE = (
    "NodeName=n1 Arch=x86_64 CoresPerSocket=8 CPUAlloc=0 CPUEfctv=14 CPUTot=16 Gres=gpu:a100:4 RealMemory=192000 "
    "CoreSpecCount=2 MemSpecLimit=4096 ThreadsPerCore=1 Partitions=gpu,debug Comment=CPUEfctv=1 is text"
)
CPUS = "n2 CPUTot=32 CoreSpecCount=2 ThreadsPerCore=2 RealMemory=1000 Partitions=gpu"


def test_what_is_kept_for_the_system_is_nothing_that_a_job_gets():
    kept = inventory.kept(f"NOTICE: CPUEfctv=3\n{NODE}\nmore of a comment\nNodeName={CPUS}\nNodeName=\n")
    assert kept["gpu", 16, 192000] == kept["debug", 16, 192000] == inventory.Kept(cpus=2, memory_mb=4096)
    assert kept["gpu", 32, 1000] == inventory.Kept(cpus=4, memory_mb=0)  # two cores of two threads
    (found,) = inventory.kinds("gpu|1|gpu:a100:4|16|192000|idle|(null)\n", kept)
    assert (found.cpus, found.kept_cpus, found.memory_gb) == (14, 2, 183)


LIMITS = (
    "PartitionName=x AllowGroups=chem,bio AllowAccounts=ALL AllowQos=ALL Hidden=YES RootOnly=NO MaxNodes=2 "
    "MaxCPUsPerNode=24 MaxMemPerNode=64000 TotalNodes=much"
)


def test_limits_of_a_partition():
    (found,) = inventory.partitions(LIMITS)
    assert (found.max_nodes, found.max_cpus, found.max_memory_mb, found.nodes) == (2, 24, 64000, 0)
    assert (found.groups, found.hidden, found.root_only) == (("chem", "bio"), True, False)


def test_what_is_no_record_is_none():
    noise = "CLUSTER: uni\n\nMaintenance on Monday | see motd\nmotd|1|2\n"
    assert (
        list(inventory.kinds(noise))
        == list(inventory.partitions(noise))
        == list(inventory.associations(noise))
        == []
    )
    assert len(list(inventory.kinds(f"{noise}gpu|1|gpu:8|64|512000|idle|(null)\n"))) == 1
    told = list(inventory.associations(f"{noise}lab||normal,long|normal\nlab||normal,long|normal\n"))
    assert [(one.account, one.qos, one.default_qos) for one in told] == [("lab", ("normal", "long"), "normal")]


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
