"""The job `convert`: weights between the hub's layout and Megatron's, by one process or by many together."""

from pathlib import Path
from typing import Any

from megatron_mixtral import signals
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.weights.convert import convert


def run(config: ConvertConfig, run_dir: Path) -> None:
    """Convert as process `RANK` of `WORLD_SIZE`."""
    signals.listen_in_a_job()
    convert(config, run_dir, compare=compare_logits)


def compare_logits(hub: Path, megatron: Path, **how: Any) -> str:
    """As `checkpoint.compare_logits.check`. A conversion without it needs neither torch nor megatron-core."""
    from megatron_mixtral.checkpoint import compare_logits  # imports both

    return compare_logits.check(hub, megatron, **how)
