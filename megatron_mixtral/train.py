"""The job `finetune`: the loop around megatron-core's parts, its log, its saves, and its way out.

All ranks run the same code and agree on everything that decides where to go next (stop, skip) by one reduction a
step. A run started again goes on from its newest complete checkpoint, with the same data as if never stopped.
"""

from megatron_mixtral import stop

stop.listen()  # before the slow imports: a signal that comes while they run must not kill the rank

import dataclasses  # noqa: E402
import gc  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_mixtral import (  # noqa: E402
    adapters,
    agreement,
    batches,
    chart,
    checkpoint,
    feed,
    loading,
    mcore,
    merging,
    model,
    optimize,
)
from megatron_mixtral.adapters import Lora  # noqa: E402
from megatron_mixtral.config import FinetuneConfig, MixtralShape  # noqa: E402
from megatron_mixtral.errors import CheckpointError, JobError, Requeue  # noqa: E402
from megatron_mixtral.events import EventLog  # noqa: E402
from megatron_mixtral.feed import Batch, Feed  # noqa: E402
from megatron_mixtral.saving import Saver  # noqa: E402

from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402

MAX_SKIPPED = 5  # updates skipped in a row before the run gives up


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands; with the weights and the optimizer, all that a resume needs."""

    step: int = 0  # steps done
    samples: int = 0  # samples consumed
    skipped: int = 0  # updates skipped for a gradient that wasn't finite


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one step came to, the same numbers on every rank."""

    loss: float  # mean over the step's learnt tokens
    aux_loss: float  # mean over layers and micro batches; 1 is perfect balance
    grad_norm: float
    updated: bool
    stop: bool
    seconds: float


def run(config: FinetuneConfig, run_dir: Path) -> None:
    """Train to `config.steps`; `Requeue` when asked to leave early, with everything saved."""
    mcore.initialize(config.layout, seed=config.seed)
    try:
        with mcore.quiet():
            trainer = Trainer(config, run_dir)
            try:
                trainer.run()
            finally:
                trainer.close()
    finally:
        mcore.shutdown()


class Trainer:
    """One run's state on one rank."""

    def __init__(self, config: FinetuneConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replica, self.replicas = mcore.data_parallel()
        batches.check_batch(config.global_batch, config.micro_batch, self.replicas)
        self.events = EventLog(run_dir / "events.jsonl" if self.rank == 0 else None)
        self.lora = Lora.asked(config)
        self.source = self._source()
        self.shape = MixtralShape.from_folder(self.source)
        self.assets = checkpoint.read_assets(self.source)
        self.corpus = feed.read(config, self.shape, self.source)
        self.train, self.validation = (
            samples and Feed(samples, config, self.replica, self.replicas)
            for samples in (self.corpus.train, self.corpus.validation)
        )
        self.parts, self.progress = self._start()
        self.saver = Saver(
            self.checkpoints,
            keep=config.keep_checkpoints,
            asynchronous=config.async_save,
            events=self.events,
            say=self._say,
        )

    def run(self) -> None:
        """Steps until the last one, a stop, or too many skipped in a row."""
        self._announce()
        self._leave_before_the_first_step()
        gc.freeze()  # what is there now stays: looking through it again makes every collection slow
        skipped_in_a_row = 0
        while self.progress.step < self.config.steps:
            outcome = self._step()
            skipped_in_a_row = 0 if outcome.updated else skipped_in_a_row + 1
            self._report(outcome)
            if skipped_in_a_row >= MAX_SKIPPED:
                raise JobError(
                    f"step {self.progress.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}: the last "
                    f"{MAX_SKIPPED} updates were skipped; the newest checkpoint is from before them"
                )
            self._evaluate_and_save(outcome)
            if outcome.stop and self.progress.step < self.config.steps:
                self.events.write("exit", code=Requeue.exit_code, reason="asked to stop")
                raise Requeue(f"asked to stop: saved at step {self.progress.step}")
        self.events.write("exit", code=0, reason="done")
        self._say(chart.loss(self.run_dir) if self.rank == 0 else "")

    def close(self) -> None:
        """Let what runs on threads come to its end; no error here hides the one that may be on its way."""
        self.train.close()
        self.saver.close()

    # Setting up

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def resumes(self) -> bool:
        return self.source.parent == self.checkpoints

    def _source(self) -> Path:
        """The weights to start from, decided by rank 0: this run's newest checkpoint, or the given model."""

        def find() -> Path:
            return checkpoint.newest(self.checkpoints) or checkpoint.resolve(Path(self.config.model).expanduser())

        return agreement.on_first_rank(find)

    def _start(self) -> tuple[optimize.Optimization, Progress]:
        """Model and optimizer with the source's values; a checkpoint of this run brings its progress along."""
        built = model.build(
            self.shape,
            self.config.layout,
            precision=self.config.precision,  # type: ignore[arg-type]
            aux_loss=self.config.aux_loss,
            max_sequence_length=self.config.sequence_length,
            random_weights=False,
            calculate_per_token_loss=True,
            deallocate_pipeline_outputs=True,
            lora=self.lora,
            seed=self.config.seed,
        )
        built.base = self._base()
        begun = time.monotonic()
        progress = Progress()
        if self.resumes:
            if built.base:
                loading.start(built, Path(built.base["path"]))
            parts = optimize.build(self.config, built)
            optimize.allocate_state(parts)
            state = self._load_training(parts)
            progress = Progress(**state.common["progress"])
            feed.same(self.config, self.corpus.identity, state.common["data"])
            if state.rank:
                mcore.restore_random_state(state.rank)
        else:
            loading.start(built, self.source)
            parts = optimize.build(self.config, built)
        _check_finite(built, self.source)
        self.events.write("load", path=str(self.source), seconds=round(time.monotonic() - begun, 2))
        return parts, progress

    def _base(self) -> dict[str, Any]:
        """Which weights the adapters belong to, checked by rank 0; empty where the whole model is trained."""
        if not (lora := self.lora):
            return {}

        def find() -> dict[str, Any]:
            if self.resumes:
                return merging.base_of_run(self.source, lora, Path(self.config.model).expanduser(), self.shape)
            return merging.describe_base(self.source, self.shape)

        return agreement.on_first_rank(find)

    def _load_training(self, parts: optimize.Optimization) -> checkpoint.State:
        """The newest checkpoint; one that is damaged ends the run and says what there is to go on from."""
        try:
            return checkpoint.load_training(parts.chunks[0], parts.optimizer, self.source)
        except CheckpointError as error:
            older = [p.name for p in checkpoint.complete(self.checkpoints) if p.name < self.source.name]
            hint = f"; to go on from {older[-1]} instead, remove {self.source}" if older else ""
            raise CheckpointError(f"{error}{hint}") from error

    def _leave_before_the_first_step(self) -> None:
        """Asked to stop while everything was being loaded: nothing is new, so nothing is saved."""
        if self.progress.step < self.config.steps and any(agreement.gathered(stop.requested())):
            self.events.write("exit", code=Requeue.exit_code, reason="asked to stop")
            raise Requeue(f"asked to stop before step {self.progress.step + 1}")

    def _announce(self) -> None:
        at = self.progress
        self.events.write(
            "start",
            step=at.step,
            steps=self.config.steps,
            world=self.world,
            layout=dataclasses.asdict(self.config.layout) | {"data": self.replicas},
            source=str(self.source),
            tokens=self.corpus.train.tokens,
            attempt=int(os.environ.get("MIXLAUNCH_ATTEMPT", "0")),
        )
        lay = self.config.layout
        self._say(
            f"{'resuming after' if self.resumes else 'starting from'} {self.source}"
            f"{f' at step {at.step}' if at.step else ''}\n"
            f"{self.world} ranks = tensor {lay.tensor} x pipeline {lay.pipeline} x context {lay.context} x data "
            f"{self.replicas}, expert {lay.expert}; {self.corpus.train.tokens:,} tokens of training data, "
            f"{self.config.global_batch * self.config.sequence_length:,} a step"
        )
        if mcore.HAVE_GPU:
            self._say(model.ways(self.parts.chunks[0].module))
        if self.lora:
            self._say(adapters.share(self.shape, self.lora))
        for note in self.corpus.notes:
            self._say(note)
        if self.config.warmup_steps > (warmup := optimize.warmup(self.config)):
            self._say(f"warm-up of {self.config.warmup_steps} steps is cut to {warmup}: the run has no more")

    # One step

    def _step(self) -> Outcome:
        config, begun = self.config, time.monotonic()
        optimize.zero_grad(self.parts)
        optimize.set_step(self.parts, self.progress.step + 1)
        made = self.train.take(self.progress.samples, ahead=self.progress.step + 1 < config.steps)
        if self.corpus.masked:
            mcore.weigh_aux_loss(self._share_learnt(made))
        sums = self._pass(made, forward_only=False)
        updated, norm = optimize.step(self.parts)
        aux = mcore.take_aux_loss()
        flags = float(stop.requested()), float(self.saver.failed())
        total, tokens, aux, stops, failures = agreement.summed([*sums, aux, *flags])
        if failures:
            self.saver.finish()
        micro_batches = config.global_batch // config.micro_batch
        self.progress = Progress(
            step=self.progress.step + 1,
            samples=self.progress.samples + config.global_batch,
            skipped=self.progress.skipped + (not updated),
        )
        return Outcome(
            loss=total / tokens if tokens else math.nan,
            aux_loss=aux / (self.shape.num_hidden_layers * micro_batches),
            grad_norm=norm,
            updated=updated,
            stop=stops > 0,
            seconds=time.monotonic() - begun,
        )

    def _share_learnt(self, made: list[Batch]) -> float:
        """Learnt tokens among all of this step's; every rank of a replica counts the same."""
        learnt, everything = agreement.summed(
            [sum(float(getattr(b.mask, what)()) for b in made) for what in ("sum", "numel")]
        )
        return learnt / everything

    def _pass(self, made: list[Batch], *, forward_only: bool) -> tuple[float, float]:
        """Forward (and backward) over one global batch; this rank's part of (sum of losses, tokens learnt)."""
        rows, length = made[0].ids.shape
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=iter(made),
            model=self.parts.chunks,
            num_microbatches=len(made),
            seq_length=length,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        # Tensor-parallel ranks of the last stage all know the loss; one of them tells it.
        if not losses or parallel_state.get_tensor_model_parallel_rank():
            return 0.0, 0.0
        total, tokens = torch.stack(losses).double().sum(0).tolist()
        return total, tokens

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean validation loss over the first `eval_steps` batches, or over all when they are fewer."""
        assert self.validation is not None
        size = self.config.global_batch
        rounds = min(self.config.eval_steps, -(-self.corpus.validation.per_epoch // size))
        for chunk in self.parts.chunks:
            chunk.eval()
        passes = [self._pass(self.validation.take(i * size), forward_only=True) for i in range(rounds)]
        for chunk in self.parts.chunks:
            chunk.train()
        total, tokens = agreement.summed([sum(p[i] for p in passes) for i in range(2)])
        return total / tokens if tokens else math.nan

    # After a step

    def _report(self, outcome: Outcome) -> None:
        config, at = self.config, self.progress
        lr = optimize.set_step(self.parts, at.step)
        rate = config.global_batch * config.sequence_length / outcome.seconds
        self.events.write(
            "step",
            step=at.step,
            steps=config.steps,
            loss=outcome.loss,
            aux_loss=outcome.aux_loss,
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens_per_s=round(rate, 1),
            skipped=at.skipped,
        )
        if at.step % config.log_interval and at.step < config.steps and outcome.updated:
            return
        left = _clock((config.steps - at.step) * outcome.seconds)
        self._say(
            f"step {at.step}/{config.steps} | loss {outcome.loss:.4f} | aux {outcome.aux_loss:.3f} | lr {lr:.2e} | "
            f"grad norm {outcome.grad_norm:.3f} | {rate:,.0f} tokens/s | {outcome.seconds:.2f} s | left {left}"
            f"{'' if outcome.updated else ' | SKIPPED: not finite'}"
        )

    def _evaluate_and_save(self, outcome: Outcome) -> None:
        at, config = self.progress.step, self.config
        last = at == config.steps
        if self.validation and config.eval_steps and (last or at % config.eval_interval == 0) and not outcome.stop:
            loss = self._evaluate()
            self.events.write("eval", step=at, loss=loss)
            self._say(f"step {at} | validation loss {loss:.4f} | perplexity {_perplexity(loss):.2f}")
        if last or outcome.stop or at % config.save_interval == 0:
            self._save(wait=last or outcome.stop)

    def _save(self, *, wait: bool) -> None:
        self.saver.save(
            self.progress.step,
            self.parts.chunks[0],
            self.parts.optimizer,
            wait=wait,
            common={"progress": dataclasses.asdict(self.progress), "data": self.corpus.identity},
            rank_state=mcore.random_state(),
            assets=self.assets,
            source={"model": self.config.model, "data": self.config.data},
        )

    def _say(self, text: str) -> None:
        if self.rank == 0 and text:
            print(text, flush=True)


def _check_finite(built: torch.nn.Module, source: Path) -> None:
    """`InputError` naming a parameter that holds NaN or infinity, on whatever rank it is."""
    wrong = next((name for name, value in built.named_parameters() if not value.isfinite().all()), None)
    agreement.raise_alike(wrong and f"{source}: parameter {wrong} holds NaN or infinity")


def _forward(waiting: Iterator[Batch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(waiting).on_device()
    output = chunk(batch.ids, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(_loss, batch.mask)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over learnt tokens and their number: megatron-core divides by the number in the whole global batch."""
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
