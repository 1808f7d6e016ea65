"""The training loop around megatron-core's parts: steps, log, saves and stops.

All ranks run the same code, and one reduction a step makes them agree on what to do next (stop, skip). A restarted
run continues from its newest complete checkpoint, with the same data as if it had never stopped.
"""

import dataclasses
import gc
import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mixtral import mcore, signals
from megatron_mixtral.checkpoint.saver import Saver
from megatron_mixtral.data.loader import Feed, MicroBatch
from megatron_mixtral.distributed import collectives
from megatron_mixtral.distributed.watchdog import Watchdog
from megatron_mixtral.errors import JobError, Requeue
from megatron_mixtral.mcore import compat, ranks
from megatron_mixtral.observability import plot
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.spec import checks, rundir
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.training import megatron_options, meters, optimizer, recorders, replicas, setup
from megatron_mixtral.training.report import Outcome, Reporter
from megatron_mixtral.training.setup import TrainingProgress

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func


def train(config: FinetuneConfig, run_dir: Path) -> None:
    """Train to `config.steps`; `Requeue` after an early stop, with everything saved."""
    megatron_options.check(config)
    recorders.check(config)
    limits = (config.setup_timeout, config.step_timeout, config.save_timeout)
    ranks.initialize(
        config.layout, seed=config.seed, timeout=max(limits) + 120, virtual_pipeline=config.virtual_pipeline
    )
    # The folder is beside the ranks' logs, if there are any; hanging ranks are named there.
    folder = Path(os.environ.get("MIXLAUNCH_LOGS", run_dir))
    watch = Watchdog(folder, rank=dist.get_rank(), world=dist.get_world_size())
    watch.enter("setting up", config.setup_timeout)
    try:
        with mcore.quiet():
            trainer = Trainer(config, run_dir, watch)
            try:
                trainer.run()
            finally:
                trainer.close()
    finally:
        watch.close()
        ranks.shutdown()


class Trainer:
    """One run's state on one rank."""

    def __init__(self, config: FinetuneConfig, run_dir: Path, watch: Watchdog) -> None:
        self.config, self.run_dir, self.watch = config, run_dir, watch
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.replica, self.replicas = ranks.data_parallel()
        checks.micro_batches(config.layout, config, self.replicas)
        self.events = EventLog(run_dir / rundir.EVENTS if self.rank == 0 else None)
        self.started = setup.start(config, self.checkpoints, self.events)
        self.corpus, self.parts, self.progress = self.started.corpus, self.started.parts, self.started.progress
        self.train = Feed(self.corpus.train, config, self.replica, self.replicas)
        held = self.corpus.validation
        self.validation = Feed(held, config, self.replica, self.replicas) if held else None
        self.load = meters.ExpertLoad(self.parts.chunks, self.started.shape)
        self.spikes = optimizer.Spikes(config.spike)
        self.save_due = False
        self.saver = Saver(
            self.checkpoints,
            keep=config.keep_checkpoints,
            asynchronous=config.async_save,
            events=self.events,
            say=self._say,
        )
        self.recorder = recorders.Recorder(config, run_dir, writes=self.rank == 0)
        self.report = Reporter(
            config, self.started.shape, self.world, events=self.events, recorder=self.recorder, say=self._say
        )

    def run(self) -> None:
        """Run steps until the last one, a stop, or too many skipped updates in a row."""
        self._announce()
        self._leave_before_the_first_step()
        gc.freeze()  # existing objects stay for good, and scanning them would slow down every garbage collection
        skipped_in_a_row, limit = 0, max(self.config.setup_timeout, self.config.step_timeout)
        while self.progress.step < self.config.steps:
            self.watch.enter(f"step {self.progress.step + 1}", limit)
            limit = self.config.step_timeout
            outcome = self._step()
            skipped_in_a_row = 0 if outcome.updated else skipped_in_a_row + 1
            self.report.step(outcome)
            if skipped_in_a_row >= self.config.max_skipped:
                raise JobError(
                    f"step {self.progress.step}: loss {outcome.loss}, gradient norm {outcome.grad_norm}: the last "
                    f"{skipped_in_a_row} updates were skipped; the newest checkpoint is from before them"
                )
            self._evaluate_and_save(outcome)
            if outcome.stop and self.progress.step < self.config.steps:
                self.events.write("exit", code=Requeue.exit_code, reason="asked to stop")
                raise Requeue(f"asked to stop: saved at step {self.progress.step}")
        self._end()

    def _end(self) -> None:
        self.events.write("exit", code=0, reason="done")
        if self.rank == 0:
            self._say(plot.loss_chart(self.run_dir))
            self._say(plot.at_the_end(self.run_dir))

    def close(self) -> None:
        """Wait for the threads; errors here don't hide an error that is already being raised."""
        self.train.close()
        self.saver.close()
        self.recorder.close()

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / rundir.CHECKPOINTS

    def _leave_before_the_first_step(self) -> None:
        """A stop during loading: nothing is new, so nothing is saved."""
        if self.progress.step < self.config.steps and any(collectives.gathered(signals.requested())):
            self.events.write("exit", code=Requeue.exit_code, reason="asked to stop")
            raise Requeue(f"asked to stop before step {self.progress.step + 1}")

    def _announce(self) -> None:
        at, started, lay = self.progress, self.started, self.config.layout
        self.events.write(
            "start",
            step=at.step,
            steps=self.config.steps,
            world=self.world,
            layout=dataclasses.asdict(lay) | {"data": self.replicas},
            source=str(started.source),
            tokens=self.corpus.train.tokens,
            attempt=int(os.environ.get("MIXLAUNCH_ATTEMPT", "0")),
        )
        self._say(
            f"{'resuming after' if started.resumes else 'starting from'} {started.source}"
            f"{f' at step {at.step}' if at.step else ''}\n"
            f"{self.world} ranks = tensor {lay.tensor} x pipeline {lay.pipeline} x context {lay.context} x data "
            f"{self.replicas}, expert {lay.expert}; {self.corpus.train.tokens:,} tokens of training data, "
            f"{self.config.global_batch * self.config.sequence_length:,} a step"
        )
        for note in started.notes(self.config):
            self._say(note)

    # One step

    def _step(self) -> Outcome:
        config, shape, begun = self.config, self.started.shape, time.monotonic()
        number = self.progress.step + 1
        optimizer.zero_grad(self.parts)
        lr = optimizer.set_step(self.parts, number)
        made = self.train.take(self.progress.samples, ahead=number < config.steps)
        waited = time.monotonic() - begun
        if self.corpus.masked:
            compat.weigh_aux_loss(self._share_learnt(made))
        sums = [*self._pass(made, forward_only=False)]
        updated, norm = optimizer.step(self.parts, self.spikes)
        sums += [compat.take_aux_loss(), float(signals.requested()), float(self.saver.failed())]
        total, tokens, aux, stops, failures, *counts = collectives.summed([*sums, *self.load.take()])
        if failures:
            self.saver.finish()
        wait, memory = collectives.largest([waited, meters.memory()])
        self.progress = TrainingProgress(
            step=number,
            samples=self.progress.samples + config.global_batch,
            skipped=self.progress.skipped + (not updated),
        )
        routed = config.global_batch * config.sequence_length * shape.num_experts_per_tok * shape.num_hidden_layers
        return Outcome(
            step=number,
            loss=total / tokens if tokens else math.nan,
            aux_loss=aux / (shape.num_hidden_layers * (config.global_batch // config.micro_batch)),
            grad_norm=norm,
            lr=lr,
            updated=updated,
            skipped=self.progress.skipped,
            stop=stops > 0,
            seconds=time.monotonic() - begun,
            data_wait=wait,
            memory=memory,
            load=meters.balance(counts, shape.num_local_experts),
            dropped=max(0.0, 1 - sum(counts) / routed),
        )

    def _share_learnt(self, made: list[MicroBatch]) -> float:
        """The share of this step's tokens that are learnt; every rank of a replica counts the same."""
        learnt, everything = collectives.summed(
            [sum(float(getattr(b.mask, what)()) for b in made) for what in ("sum", "numel")]
        )
        return learnt / everything

    def _pass(self, made: list[MicroBatch], *, forward_only: bool) -> tuple[float, float]:
        """Forward (and backward) over one global batch; this rank's part of (sum of losses, tokens learnt)."""
        rows, length = made[0].ids.shape
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=[iter(made) for _ in self.parts.chunks],
            model=self.parts.chunks,
            num_microbatches=len(made),
            seq_length=length * self.config.layout.context,
            micro_batch_size=rows,
            forward_only=forward_only,
        )
        # All tensor-parallel ranks of the last stage have the loss; one of them reports it.
        if not losses or parallel_state.get_tensor_model_parallel_rank():
            return 0.0, 0.0
        total, tokens = torch.stack(losses).double().sum(0).tolist()
        return total, tokens

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean validation loss over the first `eval_steps` batches, or over all when they are fewer."""
        assert self.validation is not None
        assert self.corpus.validation is not None
        size = self.config.global_batch
        rounds = min(self.config.eval_steps, math.ceil(self.corpus.validation.per_epoch / size))
        optimizer.settle(self.parts)
        for chunk in self.parts.chunks:
            chunk.eval()
        passes = [self._pass(self.validation.take(i * size), forward_only=True) for i in range(rounds)]
        for chunk in self.parts.chunks:
            chunk.train()
        total, tokens = collectives.summed([sum(p[i] for p in passes) for i in range(2)])
        return total / tokens if tokens else math.nan

    # After a step

    def _evaluate_and_save(self, outcome: Outcome) -> None:
        at, config = self.progress.step, self.config
        last = at == config.steps
        if config.replica_check_interval and at % config.replica_check_interval == 0:
            replicas.check(self.parts, at)
        if self.validation and config.eval_steps and (last or at % config.eval_interval == 0) and not outcome.stop:
            self.watch.enter(f"validation after step {at}", config.step_timeout * (config.eval_steps + 1))
            self.report.evaluation(at, self._evaluate())
        self.save_due = self.save_due or at % config.save_interval == 0
        if last or outcome.stop or (self.save_due and outcome.updated):  # a skipped step has nothing new to save
            self.save_due = False
            self.watch.enter(f"saving step {at}", config.save_timeout)
            self._save(wait=last or outcome.stop)

    def _save(self, *, wait: bool) -> None:
        optimizer.settle(self.parts)
        self.saver.save(
            self.progress.step,
            self.parts.chunks,
            self.parts.optimizer,
            wait=wait,
            common={"progress": dataclasses.asdict(self.progress), "data": self.corpus.identity},
            rank_state=ranks.random_state(),
            assets=self.started.assets,
            source={"model": self.config.model, "data": self.config.data},
        )

    def _say(self, text: str) -> None:
        if self.rank == 0 and text:
            print(text, flush=True)


def _forward(waiting: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
    batch = next(waiting).on_device()
    output = chunk(batch.ids, batch.positions, None, labels=batch.labels, packed_seq_params=batch.packed)
    return output, partial(_loss, batch.mask)


def _loss(mask: torch.Tensor, losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum over learnt tokens, and their number; megatron-core divides by the number in the global batch."""
    total, tokens = (losses.float() * mask).sum(), mask.sum()
    return total, tokens.int(), torch.stack([total.detach(), tokens])
