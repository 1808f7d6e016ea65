"""Run a function of a test module on N real processes that find each other through torch's env:// names.

`ranks(2, function, argument)` returns what each rank returned, in rank order. A rank that fails or hangs ends all
of them, and the test fails with every rank's last lines, stacks of hung ones included.

The function is looked up by name in its file, which each rank imports anew: keep that file's top free of
transformers and the like, or every rank pays for it.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import itertools
import os
import pickle
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
# Each worker's own, below those of jobs and sandboxes.
PORTS = itertools.cycle(random.sample(range(6_000 + WORKER % 4 * 1_000, 7_000 + WORKER % 4 * 1_000), 1_000))
GRACE = 3.0  # seconds for the other ranks to notice that one has failed


class RanksFailed(AssertionError):
    """Carries the output of all ranks."""


def ranks(
    count: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0, env: dict[str, str] | None = None
) -> list[Any]:
    """What `function(*args)` returned on each of `count` processes; arguments and results are pickled."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        call = (function.__code__.co_filename, function.__name__, args)
        (folder / "call").write_bytes(pickle.dumps(call))
        rendezvous = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        started = [_start(folder, rank, rendezvous | (env or {}), timeout) for rank in range(count)]
        try:
            failed = _wait(started, timeout)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if failed:
            raise RanksFailed(f"{failed}\n{_output(folder, count)}")
        return [pickle.loads((folder / f"result_{rank}").read_bytes()) for rank in range(count)]


def free_port() -> int:
    """Not the kernel's choice, which may be others' before a rank, which imports torch first, takes it."""
    for port in PORTS:
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("PORTS has no end")


def _start(folder: Path, rank: int, env: dict[str, str], timeout: float) -> subprocess.Popen[bytes]:
    with (folder / f"output_{rank}").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), str(timeout)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def _wait(started: list[subprocess.Popen[bytes]], timeout: float) -> str:
    """Empty when all ended well; else what went wrong first."""
    end, problem = time.monotonic() + timeout + GRACE, ""
    while any(process.poll() is None for process in started):
        codes = {rank: process.poll() for rank, process in enumerate(started) if process.poll()}
        if codes and not problem:
            rank, code = next(iter(codes.items()))
            problem, end = f"rank {rank} ended with {code}", min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            return problem or f"still running after {timeout} s"
        time.sleep(0.02)
    return problem or next(
        (f"rank {r} ended with {p.returncode}" for r, p in enumerate(started) if p.returncode), ""
    )


def _output(folder: Path, count: int) -> str:
    def tail(rank: int) -> str:
        return "\n".join((folder / f"output_{rank}").read_text(errors="replace").splitlines()[-40:])

    return "\n".join(f"--- rank {rank}\n{tail(rank)}" for rank in range(count))


def _main(folder: Path, timeout: float) -> None:
    """One rank: import the file, call the function, leave its result."""
    faulthandler.dump_traceback_later(timeout, exit=True)
    path, name, args = pickle.loads((folder / "call").read_bytes())
    sys.path.insert(0, str(Path(__file__).parents[2]))
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    gc.disable()  # while it imports torch: two fifths of the time
    spec.loader.exec_module(module)
    gc.enable()
    result = getattr(module, name)(*args)
    (folder / f"result_{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), float(sys.argv[2]))
