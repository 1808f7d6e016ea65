"""How long one waits for the launcher: --help, export, and a submission beside plain sbatch, each against its bar.

All are whole commands as typed, medians of several taken in turn. Exits with 1 when a bar is missed.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from launcher.sandbox import lifecycle

MIXLAUNCH = [sys.executable, "-m", "launcher"]
BARS = {"mixlaunch --help": 0.2, "mixlaunch export finetune": 0.5, "a submission above plain sbatch": 1.5}
EXPORT = [*MIXLAUNCH, "export", "finetune", "--cluster", "selene", "--nodes", "4"]


def seconds(argv: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """(from start to end, of a processor); the command must end well. Slurm leaves files in the home."""
    here = {"env": environment, "cwd": environment["HOME"], "stdin": subprocess.DEVNULL}
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, **here, capture_output=True, text=True)
    took, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return took, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[list[str], list[str], dict[str, str]]]:
    """(our submission, sbatch with the very script, environment) on a Slurm of our own; jobs end at once."""
    if missing := lifecycle.missing_packages():
        sys.exit(f"Slurm's daemons are missing: {' '.join(missing)}")
    site = lifecycle.up(folder / "slurm")
    try:
        profile = {
            "scheduler": "slurm",
            "slurm_conf": str(site.slurm_conf),
            "node": {"gpus": 8, "cpus": 64, "memory_gb": 512},
            "python": "/bin/true",
            "paths": {name: str(folder / name) for name in ("models", "data", "runs")},
            "signal_lead": 30,
        }
        for name in ("models/m", "data", "runs"):
            (folder / name).mkdir(parents=True)
        (folder / "data" / "finetune.idx").touch()
        (folder / "bench.yaml").write_text(yaml.safe_dump(profile))
        environment = {**os.environ, "HOME": str(folder), "SLURM_CONF": str(site.slurm_conf)}
        common = ["--cluster", str(folder / "bench.yaml"), "--model", str(folder / "models" / "m"), "--nodes", "4"]
        script = folder / "plain.sbatch"
        exported = subprocess.run([*MIXLAUNCH, "export", "finetune", *common], capture_output=True, text=True)
        script.write_text(exported.stdout)
        yield [*MIXLAUNCH, "finetune", *common], ["sbatch", str(script)], environment
    finally:
        lifecycle.down(folder / "slurm")


def measure(repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of every command, in turn, so that a busy moment doesn't fall on one of them alone."""
    with tempfile.TemporaryDirectory(prefix="bench") as name, cluster(Path(name)) as (ours, plain, environment):
        commands = {
            "mixlaunch --help": [*MIXLAUNCH, "--help"],
            "mixlaunch export finetune": EXPORT,
            "sbatch": plain,
            "mixlaunch finetune": ours,
        }
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for command in commands.values():
            seconds(command, environment)  # caches of files and of Python's bytecode fill
        for _ in range(repeat):
            for name, command in commands.items():
                found[name].append(seconds(command, environment))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    found = measure(parser.parse_args().repeat)
    middle = {name: statistics.median(took for took, _ in times) for name, times in found.items()}
    middle["a submission above plain sbatch"] = middle["mixlaunch finetune"] - middle["sbatch"]
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    busy = "; this machine was busy with other things, which counts here" if load > 2 * cores else ""
    print(f"{cores} cores, load {load:.1f}{busy}; medians of {len(found['sbatch'])}")
    print(f"{'':34}{'seconds':>8}{'fastest':>9}{'slowest':>9}{'processor':>11}{'bar':>6}")
    for name, value in middle.items():
        times = [took for took, _ in found.get(name, [])]
        used = [cpu for _, cpu in found.get(name, [])]
        span = f"{min(times):9.3f}{max(times):9.3f}{statistics.median(used):11.3f}" if times else " " * 29
        print(f"{name:34}{value:8.3f}{span}{f'{BARS[name]:6.1f}' if name in BARS else ''}")
    if missed := [name for name, bar in BARS.items() if middle[name] > bar]:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
