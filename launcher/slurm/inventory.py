"""What a Slurm says about itself: partitions, kinds of nodes, version, and what its user is allowed.

Questions go through `slurm.call`, to this machine's Slurm or to a login node's; parsing the answers is pure.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.errors import Fault
from launcher.host.base import Host
from launcher.slurm import client

GPU = re.compile(r"gpu(?::(?P<type>[A-Za-z][^:(,]*))?:(?P<count>\d+)")
NOTHING = ("", "(null)", "N/A", "NONE", "None")
GONE = re.compile(r"down|drain|fail|error|unknown|future|power", re.IGNORECASE)


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


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Nodes of one partition that are alike."""

    partition: str
    nodes: int
    gpus: int
    gpu_type: str
    cpus: int
    memory_gb: int
    features: frozenset[str]
    usable: bool


@dataclass(frozen=True, kw_only=True)
class Association:
    """An account that the user may charge, and how; no partition is every one."""

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str


@dataclass(frozen=True, kw_only=True)
class Inventory:
    """One Slurm. Where it keeps no accounts, there are no associations and nothing can be said about them."""

    config: Mapping[str, str]
    partitions: tuple[Partition, ...]
    kinds: tuple[Kind, ...]
    associations: tuple[Association, ...] | None
    default_account: str

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

    def partition(self, name: str | None) -> Partition | None:
        """The partition called so, or the default one."""
        chosen = (p for p in self.partitions if (p.name == name if name else p.default))
        return next(chosen, None)

    def of(self, partition: str) -> list[Kind]:
        """The kinds of nodes that a partition has."""
        return [kind for kind in self.kinds if kind.partition == partition]


def ask(host: Host) -> Inventory:
    """Everything that a profile can be held against; `Fault` if the controller doesn't answer."""
    config = dict(_config(host.call("scontrol", "show", "config")))
    shown = host.call("scontrol", "--all", "--oneliner", "show", "partition")
    listed = host.call("sinfo", "--all", "--exact", "--noheader", "--format=%R|%D|%G|%c|%m|%T|%f")
    associations, default = _accounts(host, config)
    try:
        return Inventory(
            config=config,
            partitions=tuple(partitions(shown)),
            kinds=tuple(kinds(listed)),
            associations=associations,
            default_account=default,
        )
    except (ValueError, KeyError) as error:
        raise Fault(f"Slurm's answer can't be read: {error}") from error


def _config(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, equals, value = line.partition("=")
        if equals:
            yield name.strip(), "" if value.strip() in NOTHING else value.strip()


def fields(line: str) -> dict[str, str]:
    """`Name=Value` pairs of scontrol's one line a thing; values that hold blanks end at the first."""
    return dict(word.partition("=")[::2] for word in line.split() if "=" in word)


def partitions(text: str) -> Iterator[Partition]:
    """From `scontrol --oneliner show partition`."""
    for line in text.splitlines():
        if line.startswith("PartitionName="):
            yield _partition(line)


def _partition(line: str) -> Partition:
    told = fields(line)
    return Partition(
        name=told["PartitionName"],
        default=told.get("Default") == "YES",
        state=told.get("State", ""),
        minutes=minutes(told.get("MaxTime", "")),
        whole_nodes=told.get("OverSubscribe", "").startswith("EXCLUSIVE"),
        nodes=int(told.get("TotalNodes", "0")),
        accounts=_words(told.get("AllowAccounts", "")),
        denied=_words(told.get("DenyAccounts", "")),
        qos=_words(told.get("AllowQos", "")),
    )


def _words(text: str) -> tuple[str, ...]:
    return () if text in NOTHING or text == "ALL" else tuple(text.split(","))


def minutes(text: str) -> int | None:
    """Slurm's time in whole minutes, rounded down; None for UNLIMITED and what isn't a time."""
    try:
        return client.seconds(text) // 60
    except ValueError:
        return None


def kinds(text: str) -> Iterator[Kind]:
    """From sinfo's partition|nodes|gres|cpus|memory|state|features."""
    for line in filter(str.strip, text.splitlines()):
        name, nodes, gres, cpus, memory, state, features = line.split("|", 6)
        found = list(GPU.finditer(gres))
        yield Kind(
            partition=name,
            nodes=int(nodes),
            gpus=sum(int(match["count"]) for match in found),
            gpu_type=next((match["type"].lower() for match in found if match["type"]), ""),
            cpus=int(cpus.rstrip("+")),
            memory_gb=int(memory.rstrip("+")) // 1024,
            features=frozenset(_words(features.strip())),
            usable=not GONE.match(state),
        )


def _accounts(host: Host, config: Mapping[str, str]) -> tuple[tuple[Association, ...] | None, str]:
    """This user's associations and default account; none to speak of where the cluster keeps no accounts."""
    if "slurmdbd" not in config.get("AccountingStorageType", ""):
        return None, ""
    try:
        user = host.call("id", "-un").strip()
        asked = ("--noheader", "--parsable2", "show")
        form = "format=account,partition,qos,defaultqos"
        told = host.call("sacctmgr", *asked, "associations", f"user={user}", form)
        default = host.call("sacctmgr", *asked, "user", user, "format=defaultaccount")
    except Fault:
        return None, ""
    return tuple(map(_association, filter(None, told.splitlines()))), default.strip()


def _association(line: str) -> Association:
    account, partition, qos, default = line.split("|")
    return Association(account=account, partition=partition, qos=_words(qos), default_qos=default)
