"""The same numbers for TensorBoard and Weights & Biases, where a run asks for them; rank 0 writes.

What is missing (a package, a key) is named before anything else is done.
"""

import importlib.util
import os
from pathlib import Path
from typing import Any

from megatron_mixtral.config import FinetuneConfig
from megatron_mixtral.errors import InputError


def check(config: FinetuneConfig) -> None:
    """`InputError` for a package that isn't installed, or a key that isn't there."""
    wanted = {"tensorboard": config.tensorboard, "wandb": bool(config.wandb_project)}
    for package, asked in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise InputError(f"{package} isn't installed where the job runs: pip install {package}")
    mode = os.environ.get("WANDB_MODE", "online")
    if config.wandb_project and mode == "online" and not os.environ.get("WANDB_API_KEY"):
        raise InputError("wandb_project: WANDB_API_KEY isn't set; put it into the run's secrets.env")


class Recorder:
    """Writes to what `config` asks for; to nothing on the other ranks."""

    def __init__(self, config: FinetuneConfig, run_dir: Path, *, writes: bool) -> None:
        self._board: Any = None
        self._wandb: Any = None
        if writes and config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"))
        if writes and config.wandb_project:
            import wandb

            # The run directory's name is the run's, so that an attempt goes on with what the last one wrote.
            self._wandb = wandb.init(
                project=config.wandb_project, name=run_dir.name, id=run_dir.name, resume="allow", dir=str(run_dir)
            )

    def record(self, step: int, numbers: dict[str, float]) -> None:
        """`numbers` of one step, by name."""
        if self._board:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(numbers, step=step)

    def close(self) -> None:
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
