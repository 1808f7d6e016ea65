"""The job `finetune`: training, with a stop or a preemption awaited from the first moment."""

from pathlib import Path

from megatron_mixtral import signals
from megatron_mixtral.spec.jobs import FinetuneConfig

signals.listen()  # before the slow imports: a signal that comes while they run must not kill the rank

from megatron_mixtral.training.loop import train  # noqa: E402


def run(config: FinetuneConfig, run_dir: Path) -> None:
    """Train to `config.steps`; `Requeue` when asked to leave early, with everything saved."""
    train(config, run_dir)
