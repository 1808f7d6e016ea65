"""What a Slurm reports about itself: partitions, kinds of nodes, version, and what its user may use.

Questions go to this machine's Slurm or to a login node's. Parsing the answers is pure, and skips what is no record.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import Fault
from launcher.host.base import Host
from launcher.slurm import client

GPU = re.compile(r"gpu(?::(?P<type>[^:(,]+))??(?::no_consume)?(?::(?P<count>\d+)[KkMmGg]?)?(?:\(.*)?")
SLICE = re.compile(r"(?<![0-9])\d+g\.(?P<gb>\d+)gb")  # a part of a GPU: 3g.40gb
NOTHING = ("", "(null)", "N/A", "NONE", "None")
GONE = re.compile(r"down|drain|fail|error|unknown|future|power", re.IGNORECASE)
KIND = re.compile(r"([^|\s]+)\|(\d+)\|([^|]*)\|(\d+)\+?\|(\d+)\+?\|([^|\s]+)\|(.*)")
DEEPEST = 20  # accounts above one another
ASSOCIATION = re.compile(r"([\w.@+-]+)\|([^|\s]*)\|([^|]*)\|([^|\s]*)")


@dataclass(frozen=True, kw_only=True)
class Partition:
    """One partition as `scontrol show partition` tells of it; no limit is None."""

    name: str
    default: bool
    state: str
    minutes: int | None  # the longest job
    whole_nodes: bool
    nodes: int
    accounts: tuple[str, ...]  # empty: all
    denied: tuple[str, ...]
    qos: tuple[str, ...]  # empty: all
    groups: tuple[str, ...] = ()  # empty: all
    hidden: bool = False
    root_only: bool = False
    max_nodes: int | None = None  # of a job
    max_cpus: int | None = None  # of a job on one node
    max_memory_mb: int | None = None  # of a job on one node
    max_memory_mb_per_cpu: int | None = None


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Nodes of one partition that are alike, with what a job may get of them."""

    partition: str
    nodes: int
    gpus: int  # of `gpu_type`, which is one where a node has several
    gpu_type: str  # as Slurm writes it, which compares capitals
    cpus: int
    memory_gb: int  # 0 where Slurm doesn't know it
    features: frozenset[str]
    usable: bool
    kept_cpus: int = 0  # for the system
    others: tuple[tuple[str, int], ...] = ()  # types and counts of the same nodes' other GPUs

    @property
    def counted(self) -> tuple[tuple[str, int], ...]:
        """The types of GPUs, and how many of each a node has."""
        return ((self.gpu_type, self.gpus), *self.others) if self.gpus else ()

    @property
    def is_slice(self) -> bool:
        """Whether what counts as a GPU is a part of one."""
        return bool(SLICE.search(self.gpu_type))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What nodes of one size keep for the system."""

    cpus: int
    memory_mb: int


@dataclass(frozen=True, kw_only=True)
class Association:
    """An account that the user may charge, and how; no partition is every one."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """One Slurm. Without accounting there are no associations, and nothing is known about them."""

    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    kinds: tuple[Kind, ...]
    associations: tuple[Association, ...] | None
    default_account: str
    groups: frozenset[str] = frozenset()  # the user's

    @property
    def version(self) -> str:
        """Such as 23.11.4."""
        return self.config.get("SLURM_VERSION", "")

    @property
    def name(self) -> str:
        """What the cluster calls itself."""
        return self.config.get("ClusterName", "")

    @property
    def enforced(self) -> bool:
        """Whether a job without a valid association is refused."""
        return "associations" in self.config.get("AccountingStorageEnforce", "")

    @property
    def counts_memory(self) -> bool:
        """Whether memory is something that jobs are given."""
        return "MEMORY" in self.config.get("SelectTypeParameters", "MEMORY").upper()

    @property
    def charged(self) -> str:
        """The account that a job without one is charged to: the default, or the first of this cluster's."""
        mine = [association.account for association in self.associations or ()]
        return self.default_account if self.default_account in mine or not mine else mine[0]

    def is_closed(self, partition: Partition) -> bool:
        """Whether this user can't use the partition, as far as groups tell."""
        foreign = bool(partition.groups and self.groups and not self.groups & set(partition.groups))
        return foreign or (partition.root_only and "root" not in self.groups)

    def partition(self, name: str | None) -> Partition | None:
        """The partition called so, or the default one."""
        chosen = (p for p in self.partitions if (p.name == name if name else p.default))
        return next(chosen, None)

    def of(self, partition: str) -> list[Kind]:
        """The kinds of nodes that a partition has."""
        return [kind for kind in self.kinds if kind.partition == partition]


def ask(host: Host) -> Inventory:
    """Everything that a profile can be compared with; `Fault` if the controller doesn't answer."""
    config = dict(_config(host.call("scontrol", "show", "config")))
    shown = host.call("scontrol", "--all", "--oneliner", "show", "partition")
    listed = host.call("sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%G|%c|%m|%T|%f")
    associations, default = _accounts(host, config)
    return Inventory(
        config=config,
        partitions=tuple(partitions(shown)),
        kinds=tuple(kinds(listed, kept(_told(host, "scontrol", "--all", "--oneliner", "show", "node")))),
        associations=associations,
        default_account=default,
        groups=frozenset(_told(host, "id", "-Gn").split()),
    )


def _told(host: Host, program: str, *arguments: str) -> str:
    """What a command says, nothing if it fails: for what one can do without."""
    try:
        return host.call(program, *arguments)
    except Fault:
        return ""


def _config(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            yield name.strip(), "" if value.strip() in NOTHING else value.strip()


def fields(line: str) -> dict[str, str]:
    """`Name=Value` pairs of scontrol's one line a thing; values that hold blanks end at the first.

    The first of a name counts: text that people write stands last.
    """
    return dict(word.partition("=")[::2] for word in reversed(line.split()) if "=" in word)


def partitions(text: str) -> Iterator[Partition]:
    """From `scontrol --oneliner show partition`."""
    for line in text.splitlines():
        if line.startswith("PartitionName=") and fields(line)["PartitionName"]:
            yield _partition(fields(line))


def _partition(told: Mapping[str, str]) -> Partition:
    return Partition(
        name=told["PartitionName"],
        default=told.get("Default") == "YES",
        state=told.get("State", ""),
        minutes=minutes(told.get("MaxTime", "")),
        whole_nodes=told.get("OverSubscribe", "").startswith("EXCLUSIVE"),
        nodes=_number(told.get("TotalNodes")) or 0,
        accounts=_words(told.get("AllowAccounts", "")),
        denied=_words(told.get("DenyAccounts", "")),
        qos=_words(told.get("AllowQos", "")),
        groups=_words(told.get("AllowGroups", "")),
        hidden=told.get("Hidden") == "YES",
        root_only=told.get("RootOnly") == "YES",
        max_nodes=_number(told.get("MaxNodes")),
        max_cpus=_number(told.get("MaxCPUsPerNode")),
        max_memory_mb=_number(told.get("MaxMemPerNode")),
        max_memory_mb_per_cpu=_number(told.get("MaxMemPerCPU")),
    )


def _number(text: str | None) -> int | None:
    """A limit; None for UNLIMITED and what isn't a number."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,12}", text) else None


def kept(text: str) -> dict[tuple[str, int, int], Kept]:
    """What is kept for the system, by partition, cores and memory: from `scontrol --oneliner show node`."""
    found: dict[tuple[str, int, int], Kept] = {}
    for line in text.splitlines():
        if line.startswith("NodeName="):
            told = fields(line)
            cpus, memory = _number(told.get("CPUTot")) or 0, _number(told.get("RealMemory")) or 0
            mine = Kept(cpus=_kept_cpus(told, cpus), memory_mb=_number(told.get("MemSpecLimit")) or 0)
            for partition in told.get("Partitions", "").split(","):
                before = found.get((partition, cpus, memory), mine)
                most = Kept(cpus=max(mine.cpus, before.cpus), memory_mb=max(mine.memory_mb, before.memory_mb))
                found[partition, cpus, memory] = most
    return found


def _kept_cpus(told: Mapping[str, str], cpus: int) -> int:
    effective = _number(told.get("CPUEfctv"))
    if effective is not None:
        return max(0, cpus - effective)
    threads = _number(told.get("ThreadsPerCore")) or 1  # Slurm older than 22.05 tells of cores alone
    return (_number(told.get("CoreSpecCount")) or 0) * threads


def _words(text: str) -> tuple[str, ...]:
    return () if text in NOTHING or text == "ALL" else tuple(text.split(","))


def minutes(text: str) -> int | None:
    """Slurm's time in whole minutes, rounded down; None for UNLIMITED and what isn't a time."""
    try:
        return client.seconds(text) // 60
    except ValueError:
        return None


def kinds(text: str, kept: Mapping[tuple[str, int, int], Kept] = {}) -> Iterator[Kind]:
    """From sinfo's partition|nodes|gres|cpus|memory|state|features."""
    for match in filter(None, map(KIND.fullmatch, text.splitlines())):
        name, nodes, gres, cpus, memory, state, features = match.groups()
        mine = kept.get((name, int(cpus), int(memory)), Kept(cpus=0, memory_mb=0))
        counted = gpus(gres)
        chosen = max(counted, key=lambda kind: _worth(kind, counted[kind]), default="")
        yield Kind(
            partition=name,
            nodes=int(nodes),
            gpus=counted.get(chosen, 0),
            gpu_type=chosen,
            cpus=max(1, int(cpus) - mine.cpus),
            memory_gb=max(0, int(memory) - mine.memory_mb) // 1024,
            features=frozenset(_words(features.strip())),
            usable=not GONE.match(state),
            kept_cpus=mine.cpus,
            others=tuple((kind, count) for kind, count in counted.items() if kind != chosen),
        )


def gpus(gres: str) -> dict[str, int]:
    """How many GPUs of each type a node's GRES has; no type is empty."""
    found: dict[str, int] = {}
    for item in re.split(r",(?![^(]*\))", gres):
        if match := GPU.fullmatch(item.strip()):
            kind, count = match["type"] or "", int(match["count"] or 1)
            found[kind] = found.get(kind, 0) + count
    return found


def _worth(gpu_type: str, count: int) -> tuple[bool, int, int]:
    """Whole GPUs before parts, larger parts before smaller ones, then the type that there is most of."""
    part = SLICE.search(gpu_type)
    return not part, int(part["gb"]) if part else 0, count


def _accounts(host: Host, config: Mapping[str, str]) -> tuple[tuple[Association, ...] | None, str]:
    """This user's associations and default account; none to speak of where the cluster keeps no accounts."""
    if "slurmdbd" not in config.get("AccountingStorageType", ""):
        return None, ""
    user = _told(host, "id", "-un").strip()
    asked = ("--noheader", "--parsable2", "show")
    whose = (f"user={user}", *((f"cluster={name}",) if (name := config.get("ClusterName")) else ()))
    try:
        told = host.call("sacctmgr", *asked, "associations", *whose, "format=account,partition,qos,defaultqos")
        default = host.call("sacctmgr", *asked, "user", user, "format=defaultaccount")
    except Fault:
        return None, ""
    named = [line for line in map(str.strip, default.splitlines()) if re.fullmatch(r"[\w.@+-]+", line)]
    return tuple(associations(told)), named[-1] if named else ""


def associations(text: str) -> Iterator[Association]:
    """From sacctmgr's account|partition|qos|defaultqos, each once."""
    for match in filter(None, map(ASSOCIATION.fullmatch, dict.fromkeys(text.splitlines()))):
        account, partition, qos, default = match.groups()
        yield Association(account=account, partition=partition, qos=_words(qos), default_qos=default)


def parents(account: str, cluster: str, host: Host) -> list[str]:
    """The accounts above `account`, the nearest first, as far as accounting tells."""
    found: list[str] = []
    while len(found) < DEEPEST:
        whose = (f"account={found[-1] if found else account}", *((f"cluster={cluster}",) if cluster else ()))
        told = _told(
            host, "sacctmgr", "--noheader", "--parsable2", "show", "associations", *whose, "format=user,parentname"
        )
        above = [line[1:] for line in told.splitlines() if re.fullmatch(r"\|[\w.@+-]+", line)]
        if not above or above[0] in (account, *found):
            break
        found.append(above[0])
    return found
