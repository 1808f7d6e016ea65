"""A first profile for the cluster that one stands on: what Slurm tells, and comments for what it can't tell.

Nothing is guessed in silence: every choice that was made among several says which others there were.
"""

import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from launcher.cluster import catalog, profile
from launcher.cluster.containers import RUNTIMES
from launcher.common import processes, quoting
from launcher.errors import Fault, UsageError
from launcher.host.local import Local
from launcher.slurm import inventory, sbatch_options
from launcher.slurm.inventory import Inventory, Kind, Partition

DAY = 24 * 60  # minutes; the longest limit that a first profile asks for
STYLES = {"gpus-per-node": "--gpus-per-node=", "gres": "--gres=gpu:", "gpus-per-task": "--gpus-per-task="}
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
}
SHARED = ("SCRATCH", "WORK", "PROJECT")  # variables by which clusters name their large shared file systems
HERE = Local()  # the environment's own Slurm: SLURM_CONF, if any, is in it


@dataclass(frozen=True, kw_only=True)
class Style:
    """How sbatch lets itself be asked for a GPU."""

    name: str
    typed: bool
    why: str


def write(name: str | None, output: Path | None) -> Path:
    """Ask Slurm, write the profile, and return its path; `UsageError` if there is one already."""
    if output is not None and output.suffix not in catalog.SUFFIXES:
        raise UsageError(f"--output: {output} must end in .yaml, so that --cluster takes it for a file")
    if name is not None:
        quoting.name(name, "NAME")
    if given := output or (catalog.own_folder() / f"{name}.yaml" if name else None):
        _refuse_existing(given)  # before anybody is asked
    cluster = inventory.ask(HERE)
    called = name or (output.stem if output else re.sub(r"[^A-Za-z0-9._-]", "-", cluster.name) or "cluster")
    path = given or catalog.own_folder() / f"{quoting.name(called, 'NAME')}.yaml"
    _refuse_existing(path)
    reference = str(output) if output else called
    text = "\n".join(_lines(cluster, called, reference)) + "\n"
    _put(path, text)
    return path


def _put(path: Path, text: str) -> None:
    """Make `path`, whole, unless it is there or isn't a profile that reads."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".new-") as folder:
            draft = Path(folder) / path.name
            draft.write_text(text)
            profile.read(draft)
            path.hardlink_to(draft)
    except FileExistsError:
        _refuse_existing(path)
        raise
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}") from error


def _refuse_existing(path: Path) -> None:
    if path.exists():
        raise UsageError(f"{path} is there already; give another name, or --output FILE.yaml")


def called(path: Path) -> str:
    """How --cluster names the profile in `path`."""
    found = catalog.available().get(path.stem)
    return path.stem if found and found.resolve() == path.resolve() else str(path)


def _lines(cluster: Inventory, name: str, reference: str) -> Iterator[str]:
    partition = _choose(cluster)
    kinds = cluster.of(partition.name)
    kind = max(kinds, key=lambda k: (k.gpus > 0, k.nodes * k.gpus, k.nodes))
    none = Style(name="none", typed=False, why="Slurm counts no GPUs here")
    style = _style(partition, _charged(cluster), kind.gpu_type) if kind.gpus else none
    yield f"# {name}: written by `mixlaunch clusters new` from what Slurm {cluster.version} says about itself."
    yield "# Read it through, mend what it couldn't know, then: mixlaunch clusters check " + reference
    yield "# Every key there is: mixlaunch clusters show example, clusters/example.yaml."
    yield _key("description", _described(partition, kind))
    yield "scheduler: slurm"
    if conf := os.environ.get("SLURM_CONF"):
        yield _key("slurm_conf", conf)
    yield _key("slurm_version", ".".join(cluster.version.split(".")[:2]) or sbatch_options.OLDEST)
    yield ""
    yield from _request(cluster, partition, kinds, style)
    yield ""
    yield from _nodes(kind, kinds, style)
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


def _choose(cluster: Inventory) -> Partition:
    """The default partition if it has GPUs, else the one with most of them; what is down comes last."""

    def worth(partition: Partition) -> tuple[bool, int, bool, int]:
        gpus = sum(kind.nodes * kind.gpus for kind in cluster.of(partition.name))
        rank = gpus if not partition.default else 10**9 * bool(gpus)
        return partition.state == "UP", rank, partition.default, partition.nodes

    if not cluster.partitions:
        raise Fault("this Slurm shows no partition to you")
    return max(cluster.partitions, key=worth)


def _described(partition: Partition, kind: Kind) -> str:
    gpus = f"{kind.gpus} x {kind.gpu_type.upper() or 'GPU'} a node" if kind.gpus else "no GPUs"
    return f"{partition.nodes} nodes, {gpus}"


def _others(chosen: str, every: Sequence[str], what: str) -> str:
    rest = [name for name in every if name != chosen]
    return f"{what}: {', '.join(rest)}" if rest else ""


def _request(cluster: Inventory, partition: Partition, kinds: list[Kind], style: Style) -> Iterator[str]:
    with_gpus = [p.name for p in cluster.partitions if any(kind.gpus for kind in cluster.of(p.name))]
    yield _key("partition", partition.name, _others(partition.name, with_gpus, "also with GPUs"))
    yield from _account(cluster)
    yield _key(
        "time", _limit(partition), "the partition's longest" if _bounded(partition) else "--time overrides it"
    )
    if partition.whole_nodes:
        yield _key("exclusive", True, "the partition gives whole nodes only")
    else:
        yield _key("exclusive", False, "true asks for whole nodes, with all their memory")
    features = sorted({feature for kind in kinds for feature in kind.features})
    if features:
        yield f"# constraint: {features[0]}  # features of these nodes: {', '.join(features)}"
    yield _key("gpu_request", style.name, style.why)


def _account(cluster: Inventory) -> Iterator[str]:
    """The user's default account and QoS, where accounting tells."""
    mine, account = cluster.associations, _charged(cluster)
    if not mine:
        yield "# account: my_project  # Slurm's accounting didn't tell; leave it out where none is needed"
        return
    yield _key("account", account, _others(account, [a.account for a in mine], "also yours"))
    found = next((a for a in mine if a.account == account), mine[0])
    if found.default_qos:
        yield _key("qos", found.default_qos, _others(found.default_qos, found.qos, "also allowed"))
    elif found.qos:
        yield f"# qos: {found.qos[0]}  # allowed: {', '.join(found.qos)}"


def _charged(cluster: Inventory) -> str:
    return cluster.default_account or next((a.account for a in cluster.associations or ()), "")


def _bounded(partition: Partition) -> bool:
    return partition.minutes is not None and partition.minutes <= DAY


def _limit(partition: Partition) -> str:
    minutes = min(partition.minutes or DAY, DAY)
    return f"{minutes // 60:02}:{minutes % 60:02}:00" if minutes < DAY else "1-00:00:00"


def _style(partition: Partition, account: str, gpu_type: str) -> Style:
    """The first way of asking for a GPU that sbatch accepts; with the GPU's type only if it must be."""
    refusals = []
    for kind in filter(None, ("1", gpu_type and f"{gpu_type}:1")):
        for name, option in STYLES.items():
            asked = ("--test-only", f"--partition={partition.name}", "--nodes=1", "--ntasks=1", "--wrap=true")
            charged = (f"--account={account}",) if account else ()
            try:
                HERE.call("sbatch", *charged, *asked, f"{option}{kind}")
            except Fault as fault:
                refusals.append(f"{option}{kind}: {' '.join(str(fault).split())}")
            else:
                why = f"sbatch refused {refusals[0]}" if refusals else "sbatch accepts it"
                return Style(name=name, typed=kind != "1", why=why)
    return Style(name="gpus-per-node", typed=False, why=f"sbatch --test-only accepted none; {refusals[0]}")


def _nodes(kind: Kind, kinds: list[Kind], style: Style) -> Iterator[str]:
    shapes = {(k.gpus, k.gpu_type, k.cpus, k.memory_gb) for k in kinds}
    if len(shapes) > 1:
        yield f"# The partition has {len(shapes)} kinds of nodes; this is the one with most GPUs in all."
    yield "node:"
    yield _key("gpus", kind.gpus, indent="  ")
    if kind.gpu_type:
        line = _key("gpu_type", kind.gpu_type, "asked for by name" if style.typed else "", indent="  ")
        yield line if style.typed else f"  # {line.strip()}  # sbatch doesn't ask for it"
    yield _key("cpus", kind.cpus, "as Slurm counts them; a rank gets its share", indent="  ")
    yield _key("memory_gb", kind.memory_gb, indent="  ")
    memory = _gpu_memory(kind.gpu_type)
    if memory:
        yield _key(
            "gpu_memory_gb", memory, f"of the {kind.gpu_type.upper()}; nvidia-smi on a node tells", indent="  "
        )
    elif kind.gpus:
        yield "  # gpu_memory_gb: 80  # nvidia-smi on a node tells; plans are held against it"
    if kind.gpus:
        yield f"  # nvlink_domain: {kind.gpus}  # GPUs that NVLink joins, if not all of a node: nvidia-smi topo -m"


def _gpu_memory(gpu_type: str) -> int | None:
    """GB of a GPU whose type tells it: nvidia_h100_80gb_hbm3, or one that comes in one size only."""
    if told := re.search(r"(?<![0-9])(\d+)gb", gpu_type):
        return int(told[1])
    return next((size for name, size in GPU_MEMORY.items() if name in re.split(r"[^a-z0-9]", gpu_type)), None)


def _software() -> Iterator[str]:
    """What containers there are, and this Python, which the compute nodes must see."""
    yield "# Where the ranks' software comes from."
    for runtime, example in _runtimes():
        yield f"# container: {{runtime: {runtime}, image: {example}}}  # {runtime} is installed here"
    yield _key("python", sys.executable, "this one; compute nodes must see it, or a container has its own")


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
    """A folder that compute nodes see as well, as far as this machine can know."""
    for variable in SHARED:
        folder = os.environ.get(variable, "")
        if folder.startswith("/") and os.access(folder, os.W_OK):
            return f"{folder.rstrip('/')}/mixlaunch", f"Below ${variable}. Compute nodes must see these folders."
    return (
        f"{Path.home()}/mixlaunch",
        "In your home; models take hundreds of GB. Compute nodes must see these folders.",
    )


def _environment(kind: Kind) -> Iterator[str]:
    threads = max(1, min(8, kind.cpus // max(1, kind.gpus)))
    yield "# Exported to every rank. The fabric is yours to fill in; ibdev2netdev and `ip addr` on a node tell."
    yield "environment:"
    yield _key("NCCL_DEBUG", "WARN", indent="  ")
    yield _key("OMP_NUM_THREADS", threads, indent="  ")
    yield "  # NCCL_SOCKET_IFNAME: ib0"
    yield "  # NCCL_IB_HCA: mlx5_0,mlx5_1"
