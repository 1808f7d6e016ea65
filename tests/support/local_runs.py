"""Runs on this machine: a job of one process that does what it is told in bash, and its end."""

import time
from pathlib import Path

from launcher.cluster import profile
from launcher.planning import jobs
from launcher.runs import states


def job_that(does: str, folder: Path, **ask) -> jobs.JobPlan:
    """A plan whose process is bash in Python's place."""
    stub = folder / "stub"
    stub.write_text(f"#!/bin/bash\n{does}\n")
    stub.chmod(0o755)
    local = profile.load("local").model_copy(update={"python": str(stub)})
    return jobs.plan_tiny(local, output=str(folder / "out"), ask=jobs.Ask(**ask))


def ended(run, seconds=60):
    deadline = time.monotonic() + seconds
    while (state := states.of_run(run)).active:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return state
