"""`python -m megatron_mixtral JOB --config FILE`: what a rendered script runs on every rank.

The run directory is the folder of FILE. The batch script decides by the exit code.
"""

import argparse
import gc
import importlib
import sys
from pathlib import Path
from types import ModuleType

from megatron_mixtral.errors import JobError
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import JOBS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_mixtral", description=__doc__)
    parser.add_argument("job", choices=sorted(JOBS))
    parser.add_argument("--config", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        job_config = checks.load(arguments.job, arguments.config)
        _module(arguments.job).run(job_config, arguments.config.resolve().parent)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _module(job: str) -> ModuleType:
    """The job's module, imported alone: `download` needs no torch.

    Garbage collection is off during the import: its objects stay anyway, and collecting takes 40 % of the time.
    """
    gc.disable()
    try:
        return importlib.import_module(f"megatron_mixtral.jobs.{job}")
    finally:
        gc.freeze()
        gc.enable()


if __name__ == "__main__":
    sys.exit(main())
