"""Waiting for runs on the real Slurm, and telling what they did when they don't do what a test waits for."""

import time

from launcher.runs import logs, record, states


def wait_until(condition, seconds: float = 60, run: record.Run | None = None):
    """The first true value of `condition()`; the run's logs tell what it did when there is none."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s{story(run) if run else ''}")
        time.sleep(0.2)
    return value


def story(run: record.Run) -> str:
    """Everything a run wrote into its logs."""
    texts = [f"{states.of_run(run)}"]
    for path in sorted((run.path / "logs").rglob("*")):
        if path.is_file():
            texts.append(f"--- {path.relative_to(run.path)}\n{path.read_text(errors='replace')[-3000:]}")
    return "\n".join(["", *texts])


def rank_logs(run: record.Run, attempt: int = 0) -> list[str]:
    """What each rank wrote, by rank."""
    world = run.record["nodes"] * run.record["tasks_per_node"]
    return [logs.path(run.path, attempt, rank).read_text() for rank in range(world)]
