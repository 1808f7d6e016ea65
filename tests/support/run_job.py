"""Run `python -m megatron_mixtral JOB` on N real processes, as a rendered script does, and see what came of it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import yaml
from spawn_ranks import free_port

from megatron_mixtral.observability import events


class Job:
    """One attempt of a job in `run_dir`; whatever happens in the test, `close` leaves no process behind."""

    def __init__(self, job, config, run_dir: Path, *, ranks: int = 1, env: dict[str, str] | None = None) -> None:
        self.run_dir, self.count = run_dir, ranks
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
        self.outputs = [run_dir / f"rank_{rank}.log" for rank in range(ranks)]
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
        self.processes = [self._start(job, rank, rendezvous | (env or {})) for rank in range(ranks)]

    def _start(self, job, rank, env):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
        with self.outputs[rank].open("wb") as output:
            return subprocess.Popen(
                [
                    *(sys.executable, "-X", "faulthandler", "-m", "megatron_mixtral"),
                    *(job, "--config", str(self.run_dir / "config.yaml")),
                ],
                env={**os.environ, **env, **place},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes by rank; a job that outlives `timeout` fails the test with the stacks of its ranks."""
        end = time.monotonic() + timeout
        try:
            while any(p.poll() is None for p in self.processes):
                if time.monotonic() > end:
                    self._dump()
                    raise AssertionError(f"still running after {timeout} s\n{self.output()}")
                time.sleep(0.05)
        finally:
            self.close()
        return [p.returncode for p in self.processes]

    def wait_for(self, event: str, timeout: float = 60.0, **fields) -> dict:
        """The first such event, as soon as it is written."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            for found in self.events(event):
                if all(found.get(k) == v for k, v in fields.items()):
                    return found
            if all(p.poll() is not None for p in self.processes):
                break
            time.sleep(0.01)
        self.close()
        raise AssertionError(f"no event {event} {fields}\n{self.output()}")

    def events(self, kind: str) -> list[dict]:
        return [e for e in events.read(self.run_dir / "events.jsonl") if e["event"] == kind]

    def output(self) -> str:
        return "\n".join(f"--- rank {n}\n{path.read_text()[-4000:]}" for n, path in enumerate(self.outputs))

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def _dump(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGABRT)
        time.sleep(1)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def run(
    job, config, run_dir: Path, *, ranks: int = 1, timeout: float = 120.0, env: dict[str, str] | None = None
) -> Job:
    """Start, wait, and return the ended job; the test fails unless every rank ended with 0."""
    done = Job(job, config, run_dir, ranks=ranks, env=env)
    codes = done.wait(timeout)
    assert codes == [0] * ranks, done.output()
    return done


def losses(job):
    """The loss of every step done last, by step."""
    return {e["step"]: e["loss"] for e in job.events("step")}
