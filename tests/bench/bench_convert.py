"""Seconds and memory of `convert` beside `cp -r` of the same weights on the same disk.

The model has Mixtral 8x7B's true tensor sizes in two layers, about 6 GB; the folder, by default the temporary one,
needs three times that. Every measurement is of processes of their own; the source is in the page cache for all.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import hub
from megatron_mixtral.weights.copying import RowRun, Target
from megatron_mixtral.weights.tensors import Rows, hub_shapes
from megatron_mixtral.weights.verification import digest

MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
}


def make(folder: Path, config: dict, write: Callable[[BinaryIO, Target], None]) -> int:
    """A hub folder of that shape in bfloat16, whose tensors `write` writes; its size in bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = hub_shapes(MixtralShape.from_hf(config))
    targets = [Target(name, (0,) * len(s), s, "bfloat16", ()) for name, s in shapes.items()]
    units = hub.shards(targets, limit=5 * 10**9)
    for unit in units:
        with (folder / unit.file).open("wb") as stream:
            stream.write(hub.header(unit.targets))
            for target in unit.targets:
                write(stream, target)
    (folder / hub.INDEX).write_text(hub.index(units))
    return sum(unit.nbytes for unit in units)


def make_of_noise(folder: Path, config: dict) -> int:
    """The same of random bits."""
    noise = os.urandom(64 << 20)

    def write(stream: BinaryIO, target: Target) -> None:
        for start in range(0, target.nbytes, len(noise)):
            stream.write(noise[: min(len(noise), target.nbytes - start)])

    return make(folder, config, write)


def timed(*commands: list[str], env: dict[str, str] | None = None) -> tuple[float, list[float]]:
    """Seconds until all commands, started together, have ended well; the peak GiB of each."""
    begun = time.perf_counter()
    started = [
        subprocess.Popen(
            command,
            env={**os.environ, **(env or {}), "RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank, command in enumerate(commands)
    ]
    peaks = []
    for process in started:
        _, status, usage = os.wait4(process.pid, 0)
        assert status == 0, f"{process.args}: status {status}"
        peaks.append(usage.ru_maxrss / 2**20)
    return time.perf_counter() - begun, peaks


def convert(source: Path, output: Path, to: str, processes: int) -> tuple[float, list[float]]:
    run = output.with_name(output.name + "_run")
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text(json.dumps({"source": str(source), "output": str(output), "to": to}))
    command = [sys.executable, "-m", "megatron_mixtral", "convert", "--config", str(run / "config.yaml")]
    return timed(*[command] * processes, env={"WORLD_SIZE": str(processes)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3, help="measurements of each; the median is shown")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        measure(Path(name), options.layers, options.repeat)


def measure(folder: Path, layers: int, repeat: int) -> None:
    # In a process of its own: what a child's peak is measured from includes what this one holds as it starts.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        size = pool.apply(make_of_noise, (folder / "hub", MIXTRAL_8X7B | {"num_hidden_layers": layers}))
    convert(folder / "hub", folder / "megatron", "megatron", 1)
    high = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    base = int(subprocess.check_output([sys.executable, "-c", high])) / 2**20
    print(
        f"{size / 1e9:.2f} GB, {layers} layers of Mixtral 8x7B; {os.cpu_count()} cores; {repeat} times each, median"
    )
    print(f"{'':34}{'seconds':>8}{'x cp':>7}   peak GiB above the interpreter, each process")
    rows = {
        "cp -r": lambda out: timed(["cp", "-r", str(folder / "hub"), str(out)]),
        "hub -> Megatron, 1 process": lambda out: convert(folder / "hub", out, "megatron", 1),
        "hub -> Megatron, 2 processes": lambda out: convert(folder / "hub", out, "megatron", 2),
        "Megatron -> hub, 1 process": lambda out: convert(folder / "megatron", out, "hf", 1),
        "Megatron -> hub, 2 processes": lambda out: convert(folder / "megatron", out, "hf", 2),
    }
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in rows}
    for _ in range(repeat):  # in turn, so that a busy moment doesn't fall on one of them alone
        for name, row in rows.items():
            found[name].append(row(folder / "out"))
            shutil.rmtree(folder / "out")
            os.sync()
    copy = median(found["cp -r"])[0]
    convert(folder / "megatron", folder / "back", "hf", 2)
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(digests, (folder / "hub", folder / "back")))) == 1, (
            "the round trip changed something"
        )
    for name, results in found.items():
        seconds, peaks = median(results)
        memory = "  ".join(f"{peak - base:.3f}" for peak in peaks) if name != "cp -r" else ""
        print(f"{name:34}{seconds:8.1f}{seconds / copy:7.2f}   {memory}")
    print("There and back, every tensor has the bits it had.")


def digests(folder: Path) -> tuple[tuple[str, str], ...]:
    """Each tensor's name and digest, read from the files as they are."""
    source = hub.HubFolder(folder)
    runs = {name: RowRun(Rows(name, (), 0, stored.shape[0]), name) for name, stored in source.tensors.items()}
    return tuple((name, digest(source, [runs[name]], int)) for name in sorted(runs))


def median(results: list[tuple[float, list[float]]]) -> tuple[float, list[float]]:
    return sorted(results)[len(results) // 2]


if __name__ == "__main__":
    main()
