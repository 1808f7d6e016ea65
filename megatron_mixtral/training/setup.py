"""Everything before a run's first step: it finds the source, checks the data, builds the model and loads it.

All ranks check everything alike. Nothing is written except the event after loading.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_mixtral.checkpoint import loading, save_load
from megatron_mixtral.data import loader
from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.mcore import cpu, ranks
from megatron_mixtral.model import build
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.training import megatron_options, optimizer
from megatron_mixtral.weights import folder, merged
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights.lora import Lora


@dataclass(frozen=True, kw_only=True)
class TrainingProgress:
    """A run's progress; with weights and optimizer it is all that a resume needs."""

    step: int = 0  # steps done
    samples: int = 0  # samples consumed
    skipped: int = 0  # updates skipped, because a gradient wasn't finite or was a spike


@dataclass(frozen=True, kw_only=True)
class Started:
    """A run ready for its next step. `source` is the folder of its weights, and `assets` the files beside them."""

    source: Path
    resumes: bool
    shape: MixtralShape
    lora: Lora | None
    assets: dict[str, bytes]
    corpus: loader.Corpus
    parts: optimizer.Optimization
    progress: TrainingProgress

    def notes(self, config: FinetuneConfig) -> list[str]:
        """Notes for the user before the first step."""
        said = [build.ways(self.parts.chunks[0].module)] if cpu.HAVE_GPU else []
        if self.lora:
            said.append(adapters.share(self.shape, self.lora))
        said += self.corpus.notes
        if config.warmup_steps > (warmup := optimizer.warmup(config)):
            said.append(f"warm-up of {config.warmup_steps} steps is shortened to {warmup}: the run is too short")
        return said


def start(config: FinetuneConfig, checkpoints: Path, events: EventLog) -> Started:
    """Everything up to the first step, on every rank."""
    source = _source(config, checkpoints)
    resumes = source.parent == checkpoints
    shape = MixtralShape.from_folder(source)
    corpus = loader.read(config, shape, source)
    assets: dict[str, bytes] = {}  # files that go into checkpoints, on the rank that writes them
    collectives.on_first_rank(lambda: assets.update(save_load.read_assets(source) | corpus.assets(source)))
    begun = time.monotonic()
    lora = Lora.asked(config)
    chunks = _build(config, shape, lora)
    base = _base(config, source, shape, lora, resumes=resumes)
    for chunk in chunks:
        chunk.base = base
    progress = TrainingProgress()
    if resumes:
        if base:
            loading.start(chunks, Path(base["path"]))
        parts = optimizer.build(config, *chunks)
        state = _load_training(parts, source)
        progress = TrainingProgress(**state.common["progress"])
        loader.same(config, corpus.identity, state.common["data"])
        if state.rank:
            ranks.restore_random_state(state.rank)
    else:
        loading.start(chunks, source)
        parts = optimizer.build(config, *chunks)
    _check_finite(chunks, source)
    events.write("load", path=str(source), seconds=round(time.monotonic() - begun, 2))
    return Started(
        source=source,
        resumes=resumes,
        shape=shape,
        lora=lora,
        assets=assets,
        corpus=corpus,
        parts=parts,
        progress=progress,
    )


def _source(config: FinetuneConfig, checkpoints: Path) -> Path:
    """The weights to start from, decided by rank 0: this run's newest checkpoint, or the given model."""

    def find() -> Path:
        return folder.newest(checkpoints) or folder.resolve(Path(config.model).expanduser())

    return collectives.on_first_rank(find)


def _build(config: FinetuneConfig, shape: MixtralShape, lora: Lora | None) -> list[Any]:
    """This rank's chunks of the model: one, or several with --virtual-pipeline."""
    several = config.virtual_pipeline > 1
    return [_chunk(config, shape, lora, i if several else None) for i in range(config.virtual_pipeline)]


def _chunk(config: FinetuneConfig, shape: MixtralShape, lora: Lora | None, vp_stage: int | None) -> Any:
    built = build.build(
        shape,
        config.layout,
        precision=config.precision,
        aux_loss=config.aux_loss,
        max_sequence_length=config.sequence_length,
        random_weights=False,
        calculate_per_token_loss=True,
        deallocate_pipeline_outputs=vp_stage is None,  # with several chunks an output may still be in transit
        lora=lora,
        seed=config.seed,
        split_sequence=True,
        vp_stage=vp_stage,
        **megatron_options.model_options(config, shape),
    )
    if config.freeze_router:
        megatron_options.freeze_router(built)
    return built


def _base(
    config: FinetuneConfig, source: Path, shape: MixtralShape, lora: Lora | None, *, resumes: bool
) -> dict[str, Any]:
    """The base of the adapters, checked by rank 0; empty if the whole model is trained."""
    if not lora:
        return {}

    def find() -> dict[str, Any]:
        if resumes:
            return merged.base_of_run(source, lora, Path(config.model).expanduser(), shape)
        return merged.describe_base(source, shape)

    return collectives.on_first_rank(find)


def _load_training(parts: optimizer.Optimization, source: Path) -> save_load.State:
    """Load the newest checkpoint; a damaged one ends the run, and the error names an older one."""
    try:
        return save_load.load_training(parts.chunks, parts.optimizer, source)
    except CheckpointError as error:
        older = [p.name for p in folder.complete(source.parent) if p.name < source.name]
        hint = f"; to continue from {older[-1]} instead, remove {source}" if older else ""
        raise CheckpointError(f"{error}{hint}") from error


def _check_finite(chunks: list[torch.nn.Module], source: Path) -> None:
    """`InputError` naming a parameter that holds NaN or infinity, on whatever rank it is."""
    named = (item for chunk in chunks for item in chunk.named_parameters())
    wrong = next((name for name, value in named if not value.isfinite().all()), None)
    collectives.raise_alike(wrong and f"{source}: parameter {wrong} holds NaN or infinity")
