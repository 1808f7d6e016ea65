"""The job `prepare`: text and conversations -> token files, by as many processes as this machine has cores."""

from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from megatron_mixtral.data.prepare import prepare
from megatron_mixtral.errors import JobError
from megatron_mixtral.spec.jobs import PrepareConfig


def run(config: PrepareConfig, run_dir: Path) -> None:
    """Prepare; `InputError` names an input that is missing, empty, or a line that isn't a document."""
    try:
        prepare(config, run_dir)
    except OSError as error:
        raise JobError(f"{error.filename or config.output}: {error.strerror or error}") from error
    except BrokenProcessPool as error:
        raise JobError("a worker was killed, perhaps because memory was full; use fewer --workers") from error
