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

from megatron_mixtral import batches, chart, checkpoint, data, mcore, model, optimize, tokenizer  # noqa: E402
from megatron_mixtral.config import FinetuneConfig, MixtralShape  # noqa: E402
from megatron_mixtral.errors import InputError, JobError, Requeue  # noqa: E402
from megatron_mixtral.events import EventLog  # noqa: E402

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
            Trainer(config, run_dir).run()
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
        self.source = self._source()
        self.shape = MixtralShape.from_folder(self.source)
        self.train, self.validation = _samples(config, self.shape, self.source)
        self.parts, self.progress = self._start()

    def run(self) -> None:
        """Steps until the last one, a stop, or too many skipped in a row."""
        self._announce()
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

    # Setting up

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    @property
    def resumes(self) -> bool:
        return self.source.parent == self.checkpoints

    def _source(self) -> Path:
        """The weights to start from, decided by rank 0: this run's newest checkpoint, or the given model."""
        found: list[Any] = [None]
        if self.rank == 0:
            newest = checkpoint.newest(self.checkpoints)
            try:
                found = [newest or checkpoint.resolve(Path(self.config.model).expanduser())]
            except InputError as error:
                found = [error]
        dist.broadcast_object_list(found, src=0)
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

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
        )
        begun = time.monotonic()
        progress = Progress()
        if self.resumes:
            parts = optimize.build(self.config, built)
            optimize.allocate_state(parts)
            state = checkpoint.load_training(parts.chunks[0], parts.optimizer, self.source)
            progress = Progress(**state.common["progress"])
            if state.rank:
                mcore.restore_random_state(state.rank)
        else:
            checkpoint.load_weights(built, self.source)
            parts = optimize.build(self.config, built)
        self.events.write("load", path=str(self.source), seconds=round(time.monotonic() - begun, 2))
        return parts, progress

    def _announce(self) -> None:
        at = self.progress
        self.events.write(
            "start",
            step=at.step,
            steps=self.config.steps,
            world=self.world,
            layout=dataclasses.asdict(self.config.layout) | {"data": self.replicas},
            source=str(self.source),
            tokens=self.train.tokens,
            attempt=int(os.environ.get("MIXLAUNCH_ATTEMPT", "0")),
        )
        lay = self.config.layout
        self._say(
            f"{'resuming after' if self.resumes else 'starting from'} {self.source}"
            f"{f' at step {at.step}' if at.step else ''}\n"
            f"{self.world} ranks = tensor {lay.tensor} x pipeline {lay.pipeline} x context {lay.context} x data "
            f"{self.replicas}, expert {lay.expert}; {self.train.tokens:,} tokens of training data, "
            f"{self.config.global_batch * self.config.sequence_length:,} a step"
        )
        if mcore.HAVE_GPU:
            self._say(model.ways(self.parts.chunks[0].module))
        if self.config.validation and self.validation is None:
            self._say("no validation: the data is a single document")

    # One step

    def _step(self) -> Outcome:
        config, begun = self.config, time.monotonic()
        optimize.zero_grad(self.parts)
        optimize.set_step(self.parts, self.progress.step + 1)
        sums = self._pass(self.train, self.progress.samples, forward_only=False)
        updated, norm = optimize.step(self.parts)
        aux = mcore.take_aux_loss()
        total, tokens, aux, stops = self._sum_over_ranks([*sums, aux, float(stop.requested())])
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

    def _pass(self, samples: batches.Samples, first: int, *, forward_only: bool) -> tuple[float, float]:
        """Forward (and backward) over one global batch; this rank's part of (sum of losses, tokens learnt)."""
        config = self.config
        chosen = batches.numbers(
            first,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=self.replica,
            replicas=self.replicas,
        )
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_micro_batches(samples, chosen),
            model=self.parts.chunks,
            num_microbatches=len(chosen),
            seq_length=config.sequence_length,
            micro_batch_size=config.micro_batch,
            forward_only=forward_only,
        )
        # Tensor-parallel ranks of the last stage all know the loss; one of them tells it.
        if not losses or parallel_state.get_tensor_model_parallel_rank():
            return 0.0, 0.0
        total, tokens = torch.stack(losses).double().sum(0).tolist()
        return total, tokens

    def _sum_over_ranks(self, values: list[float]) -> list[float]:
        everyone = torch.tensor(values, dtype=torch.float64, device=mcore.device())
        dist.all_reduce(everyone)
        return everyone.tolist()

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean validation loss over the first `eval_steps` batches, or over all when they are fewer."""
        assert self.validation is not None
        size = self.config.global_batch
        rounds = min(self.config.eval_steps, -(-self.validation.per_epoch // size))
        for chunk in self.parts.chunks:
            chunk.eval()
        passes = [self._pass(self.validation, i * size, forward_only=True) for i in range(rounds)]
        for chunk in self.parts.chunks:
            chunk.train()
        total, tokens = self._sum_over_ranks([sum(p[i] for p in passes) for i in range(2)])
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
            self._save()

    def _save(self) -> None:
        at, begun = self.progress.step, time.monotonic()
        folder = checkpoint.step_folder(self.checkpoints, at)
        checkpoint.save(
            folder,
            self.parts.chunks[0],
            self.parts.optimizer,
            step=at,
            common={"progress": dataclasses.asdict(self.progress)},
            rank_state=mcore.random_state(),
            assets=self.source,
            source={"model": self.config.model, "data": self.config.data},
        )
        seconds = round(time.monotonic() - begun, 2)
        self.events.write("checkpoint", step=at, path=str(folder), seconds=seconds)
        self._say(f"step {at} | saved {folder} in {seconds} s")
        if self.rank == 0:
            checkpoint.prune(self.checkpoints, self.config.keep_checkpoints)

    def _say(self, text: str) -> None:
        if self.rank == 0 and text:
            print(text, flush=True)


def _samples(
    config: FinetuneConfig, shape: MixtralShape, source: Path
) -> tuple[batches.Samples, batches.Samples | None]:
    """Training and validation samples; `InputError` for data that doesn't go with the model."""
    prefix = Path(config.data).expanduser()
    documents = batches.Documents(prefix)
    described = data.meta(prefix)
    if described:
        if described["vocab_size"] > shape.vocab_size:
            raise InputError(
                f"{prefix}: prepared with {described['vocab_size']} tokens, but the model knows {shape.vocab_size}"
            )
        words = tokenizer.find(source)
        if words and described["tokenizer"] != tokenizer.digest(words):
            raise InputError(f"{prefix}: prepared with another tokenizer than the model's in {source}")
    divided = batches.split(len(documents), config.validation, config.seed)
    train = batches.Samples(documents, divided.train, config.sequence_length, config.seed)
    if not len(divided.validation):
        return train, None
    return train, batches.Samples(documents, divided.validation, config.sequence_length, config.seed, pad=True)


def _micro_batches(samples: batches.Samples, chosen: list[list[int]]) -> Iterator[dict[str, torch.Tensor]]:
    """ids, labels, mask and positions, each [B, S], of one micro batch after another."""
    place = mcore.device()
    for numbers in chosen:
        pairs = [samples[n] for n in numbers]
        ids, mask = (torch.stack([torch.from_numpy(p[i]) for p in pairs]).to(place) for i in range(2))
        positions = torch.arange(ids.shape[1] - 1, device=place).expand(len(numbers), -1)
        yield {
            "ids": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "mask": mask[:, 1:].float(),
            "positions": positions,
        }


def _forward(waiting: Iterator[dict[str, torch.Tensor]], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(waiting)
    output = chunk(batch["ids"], batch["positions"], None, labels=batch["labels"])
    return output, partial(_loss, batch["mask"])


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum over learnt tokens and their number: megatron-core divides by the number in the whole global batch."""
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
