"""The job `finetune`: training. Signals are handled from the first moment."""

from pathlib import Path

from megatron_mixtral import signals
from megatron_mixtral.spec.jobs import FinetuneConfig

signals.listen()  # before the slow imports, so a signal during them doesn't kill the rank

from megatron_mixtral.training.loop import train  # noqa: E402


def run(config: FinetuneConfig, run_dir: Path) -> None:
    """Train to `config.steps`; `Requeue` after an early stop, with everything saved."""
    train(config, run_dir)
