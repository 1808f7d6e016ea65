"""The same numbers for TensorBoard and Weights & Biases, where a run asks for them; rank 0 writes.

What is missing (a package, a key) is named before anything else is done. From then on a service that can't be
reached is told of once, and the run goes on without it.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec.jobs import FinetuneConfig

NO_PROJECT = "/\\#?%:"  # characters that no project's name has
NO_RUN = "/\\#?%:;,'"  # that no run's has
FINISH_SECONDS = "15"  # for what isn't sent yet at the end: the job's place in the queue may depend on leaving


def check(config: FinetuneConfig) -> None:
    """`InputError` for a package that isn't installed, a key that isn't there, or a name that can't be."""
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
    """Writes to what `config` asks for; to nothing on the other ranks."""

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
        except Exception as error:  # whatever a service says: no report is worth a run
            self._wandb = None
            print(f"warning: Weights & Biases: {error}; the run goes on without", file=sys.stderr, flush=True)


def _join(project: str, run_dir: Path) -> Any:
    """The run that has the run directory's name, so that an attempt goes on with what the last one wrote."""
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)
    name = run_dir.name.translate(dict.fromkeys(map(ord, NO_RUN), "-"))
    return wandb.init(project=project, name=name, id=name, resume="allow", dir=str(run_dir))
