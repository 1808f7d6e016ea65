"""A first profile for the cluster of this login node: what Slurm reports, and comments for what it can't report.

No choice is silent: a comment lists the alternatives of every choice.
"""

import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from launcher.cluster import catalog, profile
from launcher.cluster.containers import RUNTIMES
from launcher.common import processes, quoting
from launcher.errors import Fault, ProfileError, UsageError
from launcher.host.local import Local
from launcher.slurm import inventory, sbatch_options
from launcher.slurm.inventory import Association, Inventory, Kind, Partition

DAY = 24 * 60  # minutes; the longest limit that a first profile asks for
STYLES = {"gpus-per-node": "--gpus-per-node=", "gres": "--gres=gpu:", "gpus-per-task": "--gpus-per-task="}
TRIED = 5  # partitions that sbatch is asked about
CALLED_AFTER_GPUS = re.compile(r"gpu|[ahv]100|[hb]200", re.IGNORECASE)
WRONG_LINE = re.compile(r":(\d+): (.*)")
GPU_MEMORY = {
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "gh200": 96,
    "l40s": 48,
    "l40": 48,
    "a40": 48,
    "a10": 24,
    "l4": 24,
    "4090": 24,
    "3090": 24,
    "2080ti": 11,
    "1080ti": 11,
}
SHARED = ("SCRATCH", "WORK", "PROJECT")  # variables by which clusters name their large shared file systems
HERE = Local()  # the environment's own Slurm: SLURM_CONF, if any, is in it


@dataclass(frozen=True, kw_only=True)
class Style:
    """A way of requesting GPUs from sbatch."""

    name: str
    typed: bool
    why: str
    accepted: bool = True


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The partition that the profile is for, those of its nodes that it describes, and how it asks for them."""

    partition: Partition
    kind: Kind | None  # none where the partition has no nodes
    style: Style
    refused: tuple[str, ...] = ()  # partitions that sbatch refused before


def write(name: str | None, output: Path | None) -> Path:
    """Ask Slurm, write the profile, and return its path; `UsageError` if there is one already."""
    if output is not None and output.suffix not in catalog.SUFFIXES:
        raise UsageError(f"--output: {output} must end in .yaml, so that --cluster takes it for a file")
    if name is not None:
        quoting.name(name, "NAME")
    if given := output or (catalog.own_folder() / f"{name}.yaml" if name else None):
        _refuse_existing(given)  # before anybody is asked
    cluster = inventory.ask(HERE)
    _require_version(cluster.version)
    called = name or (output.stem if output else re.sub(r"[^A-Za-z0-9._-]", "-", cluster.name) or "cluster")
    path = given or catalog.own_folder() / f"{quoting.name(called, 'NAME')}.yaml"
    _refuse_existing(path)
    reference = str(output) if output else called
    text = "\n".join(_lines(cluster, called, reference)) + "\n"
    _put(path, text)
    return path


def _put(path: Path, text: str) -> None:
    """Write `path` as a whole; refuse an existing file, and a text that isn't a valid profile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            draft = Path(folder) / path.name
            draft.write_text(text)
            _leave_out_mistakes(draft)
            path.hardlink_to(draft)
    except FileExistsError:
        _refuse_existing(path)
        raise
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}") from error


def _leave_out_mistakes(draft: Path) -> None:
    """Make comments of the lines that a profile can't hold, whatever a site may have said; they say why."""
    for _ in draft.read_text().splitlines():
        try:
            profile.read(draft)
            return
        except ProfileError as error:
            mistake = WRONG_LINE.search(str(error))
            lines = draft.read_text().splitlines()
            if (
                mistake is None
                or not 0 < int(mistake[1]) <= len(lines)
                or lines[int(mistake[1]) - 1].startswith("#")
            ):
                raise
            wrong = int(mistake[1]) - 1
            lines[wrong] = f"# left out: {lines[wrong].strip()}  # {mistake[2]}"
            draft.write_text("\n".join(lines) + "\n")


def _require_version(version: str) -> None:
    if (0, 0) < sbatch_options.number(version) < sbatch_options.number(sbatch_options.OLDEST):
        raise Fault(f"this cluster runs Slurm {version}; mixlaunch needs {sbatch_options.OLDEST} or newer")


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} is there already; give another name, or --output FILE.yaml")


def called(path: Path) -> str:
    """How --cluster names the profile in `path`."""
    found = catalog.available().get(path.stem)
    return path.stem if found and found.resolve() == path.resolve() else str(path)


def _lines(cluster: Inventory, name: str, reference: str) -> Iterator[str]:
    choice = _choose(cluster)
    partition, kind, style = choice.partition, choice.kind, choice.style
    kinds = cluster.of(partition.name)
    major, minor = sbatch_options.number(cluster.version)
    yield f"# {name}: written by `mixlaunch clusters new` from what Slurm {cluster.version} says about itself."
    yield "# Read it, fill in what Slurm couldn't tell, then run: mixlaunch clusters check " + reference
    yield "# Every key there is: mixlaunch clusters show example, clusters/example.yaml."
    yield _key("description", _described(partition, kind))
    yield "scheduler: slurm"
    if conf := os.environ.get("SLURM_CONF"):
        yield _key("slurm_conf", conf)
    yield _key("slurm_version", f"{major}.{minor:02}" if major else sbatch_options.OLDEST)
    yield ""
    yield from _request(cluster, choice)
    yield ""
    yield from _nodes(kind, kinds, cluster, partition, style) if kind else ("# node: the partition has none now",)
    yield ""
    yield from _software()
    yield ""
    yield from _places()
    yield ""
    yield from _environment(kind)


def _key(name: str, value: object, comment: str = "", *, indent: str = "") -> str:
    """`name: value` as YAML reads it back."""
    text = yaml.safe_dump({name: value}, allow_unicode=True, width=float("inf")).rstrip("\n")
    return f"{indent}{text}{f'  # {comment}' if comment else ''}"


def _choose(cluster: Inventory) -> Choice:
    """The first of the likely partitions for which sbatch accepts a job; the likeliest where it accepts none."""
    refused: list[Choice] = []
    for partition in sorted(cluster.partitions, key=lambda partition: _worth(cluster, partition), reverse=True):
        choice = _choice(cluster, partition)
        if choice.style.accepted or len(refused) == TRIED:
            return replace(choice, refused=tuple(one.partition.name for one in refused))
        refused.append(choice)
    if not refused:
        raise Fault("this Slurm shows you no partition")
    return refused[0]


def _worth(cluster: Inventory, partition: Partition) -> tuple[bool, bool, bool, int, bool, int]:
    """The default partition if it has GPUs, else the one with most of them; closed and hidden ones come last."""
    gpus = sum(kind.nodes * kind.gpus for kind in cluster.of(partition.name))
    rank = gpus if not partition.default else 10**9 * bool(gpus)
    is_open = not cluster.is_closed(partition)
    return partition.state == "UP", is_open, not partition.hidden, rank, partition.default, partition.nodes


def _choice(cluster: Inventory, partition: Partition) -> Choice:
    kinds = cluster.of(partition.name)
    shapes = Counter[object]()
    for kind in kinds:
        shapes[_shape(kind)] += kind.nodes

    def worth(kind: Kind) -> tuple[bool, bool, int, int]:
        nodes = shapes[_shape(kind)]
        return kind.gpus > 0, not kind.is_slice, nodes * kind.gpus, nodes

    chosen = max(kinds, key=worth, default=None)
    if chosen is None or not chosen.gpus:
        none = Style(name="none", typed=False, why="Slurm counts no GPUs here")
        return Choice(partition=partition, kind=chosen, style=none)
    return Choice(partition=partition, kind=chosen, style=_style(cluster, partition, chosen))


def _shape(kind: Kind) -> tuple[object, ...]:
    return kind.gpus, kind.gpu_type, kind.cpus, kind.memory_gb


def _described(partition: Partition, kind: Kind | None) -> str:
    if kind is None or not kind.gpus:
        return f"{partition.nodes} nodes, no GPUs"
    called = kind.gpu_type if kind.is_slice else kind.gpu_type.upper()
    return f"{partition.nodes} nodes, {kind.gpus} x {called or 'GPU'} a node"


def _others(chosen: str, every: Sequence[str], what: str) -> str:
    rest = [name for name in every if name != chosen]
    return f"{what}: {', '.join(rest)}" if rest else ""


def _request(cluster: Inventory, choice: Choice) -> Iterator[str]:
    partition, kinds = choice.partition, cluster.of(choice.partition.name)
    yield _key("partition", partition.name, _other_partitions(cluster, choice))
    yield from _account(cluster, partition)
    yield _key(
        "time", _limit(partition), "the partition's longest" if _bounded(partition) else "--time overrides it"
    )
    if partition.max_nodes:
        yield f"# A job of this partition gets {partition.max_nodes} nodes at most."
    if partition.whole_nodes:
        yield _key("exclusive", True, "the partition gives whole nodes only")
    else:
        yield _key("exclusive", False, "true asks for whole nodes, with all their memory")
    if choice.kind and choice.kind.features:
        shown = ", ".join(sorted(choice.kind.features))
        yield f"# constraint: {_feature(choice.kind, kinds)}  # features of these nodes: {shown}"
    yield _key("gpu_request", choice.style.name, choice.style.why)


def _other_partitions(cluster: Inventory, choice: Choice) -> str:
    """Those that the profile might have been for."""
    open_ones = [p for p in cluster.partitions if not cluster.is_closed(p) and p.name not in choice.refused]
    with_gpus = [p.name for p in open_ones if any(kind.gpus for kind in cluster.of(p.name))]
    if with_gpus:
        return _others(choice.partition.name, with_gpus, "also with GPUs")
    called = [p.name for p in open_ones if CALLED_AFTER_GPUS.search(p.name)]
    return _others(choice.partition.name, called, "may have GPUs that Slurm doesn't count")


def _feature(kind: Kind, kinds: Sequence[Kind]) -> str:
    """A feature that tells nodes of this kind from the partition's others, if there is one."""
    foreign = {feature for other in kinds if _shape(other) != _shape(kind) for feature in other.features}
    telling = sorted(kind.features - foreign) or sorted(kind.features)
    return kind.gpu_type if kind.gpu_type in telling else telling[0]


def _account(cluster: Inventory, partition: Partition) -> Iterator[str]:
    """The user's default account, and a QoS that the partition takes, where accounting tells."""
    mine = cluster.associations
    if not mine:
        yield "# account: my_project  # Slurm's accounting didn't say; not every cluster needs one"
        return
    found = _charged(cluster)
    accounts = list(dict.fromkeys(a.account for a in mine))
    yield _key("account", found.account, _others(found.account, accounts, "also yours"))
    allowed = [qos for qos in found.qos if not partition.qos or qos in partition.qos]
    if qos := _qos(cluster, partition):
        yield _key("qos", qos, _others(qos, allowed, "also allowed"))
    elif allowed:
        yield f"# qos: {allowed[0]}  # allowed: {', '.join(allowed)}"


def _charged(cluster: Inventory) -> Association:
    mine = cluster.associations or ()
    return next(association for association in mine if association.account == cluster.charged)


def _qos(cluster: Inventory, partition: Partition) -> str:
    """The user's default QoS if the partition takes it, else one that it does take; empty where Slurm decides."""
    if not cluster.associations:
        return ""
    found = _charged(cluster)
    if not partition.qos or found.default_qos in partition.qos:
        return found.default_qos
    return next((qos for qos in found.qos if qos in partition.qos), found.default_qos)


def _bounded(partition: Partition) -> bool:
    return partition.minutes is not None and partition.minutes <= DAY


def _limit(partition: Partition) -> str:
    minutes = min(partition.minutes or DAY, DAY)
    return f"{minutes // 60:02}:{minutes % 60:02}:00" if minutes < DAY else "1-00:00:00"


def _style(cluster: Inventory, partition: Partition, kind: Kind) -> Style:
    """The first way of asking for a GPU that sbatch accepts; by type if it must be, or if there are several."""
    asked = ["--test-only", f"--partition={partition.name}", "--nodes=1", "--ntasks=1", "--wrap=true"]
    asked += [f"--account={cluster.charged}"] if cluster.charged else []
    asked += [f"--qos={qos}"] if (qos := _qos(cluster, partition)) else []
    typed = f"{kind.gpu_type}:1"
    counts = [count for count in ("1", typed) if count != ":1"]
    refusals = []
    for count in reversed(counts) if _has_several_types(cluster.of(partition.name)) else counts:
        for name, option in STYLES.items():
            try:
                HERE.call("sbatch", *asked, f"{option}{count}")
            except Fault as fault:
                refusals.append(f"{option}{count}: {' '.join(str(fault).split())}")
            else:
                why = f"sbatch refused {refusals[0]}" if refusals else "sbatch accepts it"
                return Style(name=name, typed=count == typed, why=why)
    why = f"sbatch --test-only accepted none; {refusals[0]}"
    return Style(name="gpus-per-node", typed=False, why=why, accepted=False)


def _has_several_types(kinds: Sequence[Kind]) -> bool:
    return len({gpu_type for kind in kinds for gpu_type, _ in kind.counted}) > 1


def _nodes(kind: Kind, kinds: list[Kind], cluster: Inventory, partition: Partition, style: Style) -> Iterator[str]:
    shapes = {_shape(k) for k in kinds}
    if len(shapes) > 1:
        yield f"# The partition has {len(shapes)} kinds of nodes; this is the one with most GPUs in all."
    if kind.others:
        yield f"# These nodes also have {', '.join(f'{count} x {gpu_type}' for gpu_type, count in kind.others)}."
    yield "node:"
    yield _key("gpus", kind.gpus, indent="  ")
    if kind.gpu_type:
        line = _key("gpu_type", kind.gpu_type, "asked for by name" if style.typed else "", indent="  ")
        yield line if style.typed else f"  # {line.strip()}  # sbatch doesn't need it"
    cpus = min(kind.cpus, partition.max_cpus or kind.cpus)
    yield _key("cpus", cpus, _why_cpus(kind, cpus), indent="  ")
    yield _memory(kind, cpus, cluster, partition)
    memory = _gpu_memory(kind.gpu_type)
    if memory:
        yield _key(
            "gpu_memory_gb", memory, f"of the {kind.gpu_type.upper()}; nvidia-smi on a node shows it", indent="  "
        )
    elif kind.gpus:
        yield "  # gpu_memory_gb: 80  # nvidia-smi on a node shows it; `plan` compares the job's memory with it"
    if kind.gpus and not kind.is_slice:
        yield f"  # nvlink_domain: {kind.gpus}  # GPUs that NVLink joins, if not all of a node: nvidia-smi topo -m"


def _why_cpus(kind: Kind, cpus: int) -> str:
    if cpus < kind.cpus:
        return f"the most that the partition gives of {kind.cpus}"
    kept = f", without {kind.kept_cpus} for the system" if kind.kept_cpus else ""
    return f"as Slurm counts them{kept}; a rank gets its share"


def _memory(kind: Kind, cpus: int, cluster: Inventory, partition: Partition) -> str:
    """What a job may ask for; a comment where this Slurm gives no memory, and so refuses one that asks."""
    if not kind.memory_gb:
        return "  # memory_gb: left out; Slurm doesn't know the nodes' memory and refuses a job that asks for some"
    if not cluster.counts_memory:
        return (
            f"  # memory_gb: {kind.memory_gb}  # left out; this Slurm doesn't count memory (SelectTypeParameters)"
        )
    of_cpus = (partition.max_memory_mb_per_cpu or 0) * cpus
    limits = [limit // 1024 for limit in (partition.max_memory_mb, of_cpus) if limit]
    most = max(1, min([kind.memory_gb, *limits]))
    return _key(
        "memory_gb", most, "the most that the partition gives" if most < kind.memory_gb else "", indent="  "
    )


def _gpu_memory(gpu_type: str) -> int | None:
    """GB of a GPU, if its type says so: nvidia_h100_80gb_hbm3, or one that comes in one size only."""
    gpu_type = gpu_type.lower()
    if told := re.search(r"(?<![0-9])(\d+)gb", gpu_type):
        return int(told[1])
    return next((size for name, size in GPU_MEMORY.items() if name in re.split(r"[^a-z0-9]", gpu_type)), None)


def _software() -> Iterator[str]:
    """What containers there are, and this Python, which the compute nodes must see."""
    yield "# Where the ranks' software comes from."
    for runtime, example in _runtimes():
        yield f"# container: {{runtime: {runtime}, image: {example}}}  # {runtime} is installed here"
    yield _key("python", sys.executable, "this one; compute nodes must see it, unless a container has its own")


def _runtimes() -> Iterator[tuple[str, str]]:
    try:
        srun = HERE.call("srun", "--help")
    except Fault:
        srun = ""  # a login node without srun can still submit
    for name, runtime in RUNTIMES.items():
        there = runtime.srun_option in srun if runtime.srun_option else processes.which(name)
        if there and runtime.image:
            yield name, runtime.image


def _places() -> Iterator[str]:
    base, why = _base()
    yield f"# {why}"
    yield "paths:"
    for name in ("models", "data", "runs"):
        yield _key(name, f"{base}/{name}", indent="  ")


def _base() -> tuple[str, str]:
    """A folder that compute nodes probably see as well."""
    for variable in SHARED:
        folder = os.environ.get(variable, "")
        if folder.startswith("/") and os.access(folder, os.W_OK):
            return f"{folder.rstrip('/')}/mixlaunch", f"Below ${variable}. Compute nodes must see these folders."
    return (
        f"{Path.home()}/mixlaunch",
        "In your home; models take hundreds of GB. Compute nodes must see these folders.",
    )


def _environment(kind: Kind | None) -> Iterator[str]:
    threads = max(1, min(8, kind.cpus // max(1, kind.gpus))) if kind else 1
    yield "# Exported to every rank. Fill in the fabric; ibdev2netdev and `ip addr` on a node show it."
    yield "environment:"
    yield _key("NCCL_DEBUG", "WARN", indent="  ")
    yield _key("OMP_NUM_THREADS", threads, indent="  ")
    yield "  # NCCL_SOCKET_IFNAME: ib0"
    yield "  # NCCL_IB_HCA: mlx5_0,mlx5_1"
