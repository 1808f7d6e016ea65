"""`python -m megatron_mixtral.jobs.health`: tests each node before the ranks start, with one process a node.

Each process tests its own node. Then all nodes do an all-reduce. If it fails, neighbours are tested in pairs, and a
node that fails with every neighbour is bad. The last line of its output is `health: ok` or `health: REASON`.
"""

import argparse
import contextlib
import datetime
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

OK = "ok"
CUT_OFF = "cut off"
GATHER = 60.0  # seconds that a node may take longer than the first node to test itself
REDUCE = 60.0  # seconds for one all-reduce, including the start of its process
SPARE = 0.02  # share of main memory that must be free
USED = 0.05  # share of a GPU's memory that may be in use before the job has begun
SKEW = 30.0  # seconds that a clock may be wrong
SOME = 1 << 20  # bytes of a test file
TENSOR = {"nccl": 16 << 20, "gloo": 1 << 16}  # elements


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that each node must have")
    parser.add_argument("--group", help="the all-reduce of these ranks: a round's name and ranks, in JSON")
    arguments = parser.parse_args()
    if arguments.group:
        reduce(*json.loads(arguments.group))
        return 0
    print(f"health: {Node(arguments.folder, arguments.gpus).verdict()}", flush=True)
    return 0


class Node:
    """This node among the others. They exchange results through a store on the first node."""

    def __init__(self, folder: Path, gpus: int) -> None:
        self.folder, self.gpus = folder, gpus
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.names = (folder / "nodes").read_text().split()

    def verdict(self) -> str:
        """`ok`, or what is wrong with this node."""
        mine: dict[str, Any] = {"problems": list(problems(self.folder)), "gpus": torch.cuda.device_count()}
        if self.world == 1:
            return _first(mine["problems"] or _gpu_count(self.gpus, mine["gpus"], mine["gpus"]))
        try:
            store = _store(self.rank, self.world)
            return self._among(store, mine)
        except (dist.DistError, RuntimeError) as error:
            return f"{CUT_OFF} from {self.names[0]}: {_line(error)}"

    def _among(self, store: dist.TCPStore, mine: dict) -> str:
        store.set(f"report/{self.rank}", json.dumps(mine))
        members = self._members(store)
        if self.rank not in members:
            return f"its own test took over {GATHER:.0f} s longer than the first node's"
        reports = {rank: json.loads(store.get(f"report/{rank}")) for rank in members}
        skew = self._skew(store, members)
        most = max(report["gpus"] for report in reports.values())
        found = [*mine["problems"], *_gpu_count(self.gpus, mine["gpus"], most), *skew]
        fit = [rank for rank in members if not reports[rank]["problems"]]
        if self.rank in fit and len(fit) > 1:
            found += self._network(store, fit)
        self._leave(store, members)
        return _first(found)

    def _members(self, store: dist.TCPStore) -> list[int]:
        """The nodes that reported in time, as the first node decides."""
        if self.rank == 0:
            deadline = time.monotonic() + GATHER
            missing = set(range(self.world))
            while missing and time.monotonic() < deadline:
                missing = {rank for rank in missing if not store.check([f"report/{rank}"])}
                time.sleep(0.05)
            store.set("members", json.dumps([rank for rank in range(self.world) if rank not in missing]))
        return json.loads(store.get("members"))

    def _skew(self, store: dist.TCPStore, members: list[int]) -> list[str]:
        """Compare the clocks at a moment that the first node chooses."""
        if self.rank == members[0]:
            store.set("now", "")
        store.wait(["now"])
        store.set(f"clock/{self.rank}", str(time.time()))
        clocks = {rank: float(store.get(f"clock/{rank}")) for rank in members}
        ahead = clocks[self.rank] - statistics.median(clocks.values())
        return (
            [f"its clock is {abs(ahead):.0f} s {'ahead' if ahead > 0 else 'behind'}"] if abs(ahead) > SKEW else []
        )

    def _network(self, store: dist.TCPStore, fit: list[int]) -> list[str]:
        """An all-reduce of all nodes; if it fails, of every two neighbours in a ring."""
        if self._round(store, "all", fit):
            return []
        works: dict[int, bool] = {}
        for number, pair in enumerate(_ring(fit)):
            if self.rank in pair:
                other = pair[0] if pair[1] == self.rank else pair[1]
                works[other] = self._round(store, f"pair{number}", pair)
        if any(works.values()):
            return []
        names = " and ".join(self.names[rank] for rank in works)
        return [f"an all-reduce with {names} fails"]

    def _round(self, store: dist.TCPStore, name: str, ranks: list[int]) -> bool:
        """Whether all of `ranks` got the right sum. It runs in its own process, which can be killed if it hangs."""
        argv = [sys.executable, "-P", "-m", "megatron_mixtral.jobs.health"]
        argv += ["--folder", str(self.folder), "--group", json.dumps([name, ranks])]
        with subprocess.Popen(argv) as process:
            deadline = time.monotonic() + REDUCE
            while process.poll() is None:
                if time.monotonic() > deadline or store.check([f"{name}/failed"]):
                    process.kill()  # without its partner it can only wait
                time.sleep(0.05)
        if process.returncode:
            store.set(f"{name}/failed", "")
        store.set(f"{name}/{self.rank}", "")
        store.wait([f"{name}/{rank}" for rank in ranks])
        return not store.check([f"{name}/failed"])

    def _leave(self, store: dist.TCPStore, members: list[int]) -> None:
        """The first node holds the store and leaves last."""
        store.set(f"left/{self.rank}", "")
        if self.rank == 0:
            with contextlib.suppress(dist.DistError, RuntimeError):
                store.wait([f"left/{rank}" for rank in members], datetime.timedelta(seconds=4 * REDUCE))


def reduce(name: str, ranks: list[int]) -> None:
    """One all-reduce of `ranks`; raises unless the sum is right."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    rank, world = ranks.index(int(os.environ["RANK"])), len(ranks)
    store = dist.PrefixStore(f"round/{name}", _store(rank, world, client=True))
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=REDUCE / 2)
    )
    device = "cuda:0" if backend == "nccl" else "cpu"
    tensor = torch.full((TENSOR[backend],), float(rank + 1), device=device)
    dist.all_reduce(tensor)
    expected = world * (world + 1) / 2
    if not bool((tensor == expected).all()):
        raise SystemExit(f"the sum is {tensor.min().item()}..{tensor.max().item()}, not {expected}")
    dist.destroy_process_group()


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with this node by itself."""
    yield from _writable("the run directory", folder)
    if Path("/dev/shm").is_dir():
        yield from _writable("/dev/shm", Path("/dev/shm"))
    yield from _memory(Path("/proc/meminfo").read_text())
    for index in range(torch.cuda.device_count()):
        yield from _gpu(index)


def _writable(what: str, folder: Path) -> Iterator[str]:
    path = folder / f".health-{socket.gethostname()}-{os.getpid()}"
    try:
        with path.open("wb") as stream:
            stream.write(bytes(SOME))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        yield f"{what} can't be written: {error.strerror}"
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _memory(meminfo: str) -> Iterator[str]:
    """Of /proc/meminfo, whose numbers are KiB."""
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.splitlines() if len(line.split()) > 1}
    total, free = sizes.get("MemTotal", 0), sizes.get("MemAvailable", 0)
    if free < SPARE * total:
        yield f"main memory: {free / 2**20:.1f} of {total / 2**20:.0f} GiB are free"


def _gpu(index: int) -> Iterator[str]:
    """It must be free and multiply."""
    try:
        free, total = torch.cuda.mem_get_info(index)
        if total - free > max(USED * total, 1 << 30):
            taken = f"{(total - free) / 2**30:.1f} of {total / 2**30:.0f} GiB"
            yield f"GPU {index}: {taken} are used by another program"
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        if float((ones @ ones).sum()) != 256.0**3:
            yield f"GPU {index}: it multiplies wrongly"
    except RuntimeError as error:
        yield f"GPU {index}: {_line(error)}"


def _gpu_count(asked: int, mine: int, most: int) -> list[str]:
    """Too few GPUs make a node bad if other nodes show theirs, or if it has a driver."""
    if mine >= asked or (most == 0 and not shutil.which("nvidia-smi")):
        return []
    return [f"{mine} of {asked} GPUs are visible"]


def _ring(ranks: list[int]) -> Iterator[list[int]]:
    """Pairs of neighbours in a ring, each once, in rounds in which every node is in at most one pair."""
    edges = list(zip(ranks, [*ranks[1:], ranks[0]], strict=True)) if len(ranks) > 2 else [tuple(ranks)]
    last = edges[-1:] if len(edges) % 2 and len(edges) > 1 else []
    paired = edges[: len(edges) - len(last)]
    yield from (list(edge) for edge in [*paired[::2], *paired[1::2], *last])


def _store(rank: int, world: int, *, client: bool = False) -> dist.TCPStore:
    return dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world,
        is_master=rank == 0 and not client,
        timeout=datetime.timedelta(seconds=2 * GATHER + REDUCE),
        wait_for_workers=False,
    )


def _first(found: list[str]) -> str:
    return found[0] if found else OK


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
