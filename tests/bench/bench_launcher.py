"""How long one waits for the launcher: --help, export, and a submission beside plain sbatch, each against its bar.

All are whole commands as typed, medians of several taken in turn. Exits with 1 when a bar is missed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml

from launcher import sandbox

MIXLAUNCH = [sys.executable, "-m", "launcher"]
BARS = {"mixlaunch --help": 0.2, "mixlaunch export finetune": 0.5, "a submission above plain sbatch": 1.5}
EXPORT = [*MIXLAUNCH, "export", "finetune", "--cluster", "selene", "--nodes", "4"]


def seconds(argv: list[str], environment: dict[str, str]) -> float:
    """From the start of a command to its end; it must end well. Slurm leaves its own files in the home."""
    here = {"env": environment, "cwd": environment["HOME"], "stdin": subprocess.DEVNULL}
    begun = time.perf_counter()
    done = subprocess.run(argv, **here, capture_output=True, text=True)
    took = time.perf_counter() - begun
    assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
    return took


@contextmanager
def cluster(folder: Path) -> Iterator[tuple[list[str], list[str], dict[str, str]]]:
    """(our submission, sbatch with the very script, environment) on a Slurm of our own; jobs end at once."""
    if missing := sandbox.missing_packages():
        sys.exit(f"Slurm's daemons are missing: {' '.join(missing)}")
    site = sandbox.up(folder / "slurm")
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
        sandbox.down(folder / "slurm")


def measure(repeat: int) -> dict[str, list[float]]:
    """Seconds of every command, in turn, so that a busy moment doesn't fall on one of them alone."""
    with tempfile.TemporaryDirectory(prefix="bench") as name, cluster(Path(name)) as (ours, plain, environment):
        commands = {
            "mixlaunch --help": [*MIXLAUNCH, "--help"],
            "mixlaunch export finetune": EXPORT,
            "sbatch": plain,
            "mixlaunch finetune": ours,
        }
        found: dict[str, list[float]] = {name: [] for name in commands}
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
    middle = {name: statistics.median(times) for name, times in found.items()}
    middle["a submission above plain sbatch"] = middle["mixlaunch finetune"] - middle["sbatch"]
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; medians of {len(found['sbatch'])}")
    print(f"{'':34}{'seconds':>8}{'fastest':>9}{'slowest':>9}{'bar':>7}")
    missed = []
    for name, value in middle.items():
        span = f"{min(found[name]):9.3f}{max(found[name]):9.3f}" if name in found else " " * 18
        bar = BARS.get(name)
        print(f"{name:34}{value:8.3f}{span}{f'{bar:7.1f}' if bar else ''}")
        if bar and value > bar:
            missed.append(name)
    if missed:
        sys.exit(f"missed: {', '.join(missed)}")


if __name__ == "__main__":
    main()
