"""Reports a step's numbers to TensorBoard and Weights & Biases; rank 0 writes.

A missing package or key is an error before anything else is done. If a service can't be reached later, that is
reported once, and the run continues without it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec.jobs import FinetuneConfig

NO_PROJECT = "/\\#?%:"  # characters that a project's name can't have
NO_RUN = "/\\#?%:;,'"  # characters that a run's name can't have
FINISH_SECONDS = "15"  # limit for sending the rest at the end, because the job may have to exit soon to be requeued


def check(config: FinetuneConfig) -> None:
    """`InputError` for a missing package, a missing key, or an invalid name."""
    wanted = {"tensorboard": config.tensorboard, "wandb": bool(config.wandb_project)}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(f"{package} isn't installed where the job runs: pip install {package}")
    mode = os.environ.get("WANDB_MODE", "online")
    if config.wandb_project and mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise InputError("wandb_project: WANDB_API_KEY isn't set; put it into the run's secrets.env")
    if set(NO_PROJECT) & set(config.wandb_project) or len(config.wandb_project) > 128:
        raise InputError(f"wandb_project: {config.wandb_project!r}: at most 128 characters, none of {NO_PROJECT}")


class Recorder:
    """Writes to the services in `config`; does nothing on the other ranks."""

    def __init__(self, config: FinetuneConfig, run_dir: Path, *, writes: bool) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if writes and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))
        if writes and config.wandb_project:
            self._wandb = self._unless_it_fails(lambda: _join(config.wandb_project, run_dir))

    def record(self, step: int, numbers: dict[str, float]) -> None:
        """`numbers` of one step, by name."""
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._unless_it_fails(lambda: self._wandb.log(numbers, step=step))

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._unless_it_fails(self._wandb.finish)

    def _unless_it_fails(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:  # catch every error: a report must never end a run
            self._wandb = None
            print(f"warning: Weights & Biases: {error}; the run continues without it", file=sys.stderr, flush=True)


def _join(project: str, run_dir: Path) -> Any:
    """Join the W&B run with the run directory's name, so all attempts are one W&B run."""
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    name = run_dir.name.translate(dict.fromkeys(map(ord, NO_RUN), "-"))
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run_dir))
