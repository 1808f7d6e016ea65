"""Reports a training run: a log line and an event for each step.

Only rank 0 prints and writes; every rank may call it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.training import meters
from megatron_mixtral.training.recorders import Recorder


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of one step, the same on every rank."""

    step: int
    loss: float  # mean over the step's learnt tokens
    aux_loss: float  # mean over layers and micro batches; 1 is perfect balance
    grad_norm: float
    lr: float
    updated: bool
    skipped: int  # updates, so far
    stop: bool
    seconds: float
    data_wait: float  # the part of them that the slowest rank waited for its batches
    memory: float  # GiB at most, on the fullest rank
    load: tuple[float, float]  # (mean, worst) over layers: the busiest expert's tokens divided by the mean
    dropped: float  # share of the routed tokens that no expert took


class Reporter:
    """Turns outcomes into log lines, events and the records of other programs."""

    def __init__(
        self,
        config: FinetuneConfig,
        shape: MixtralShape,
        world: int,
        *,
        events: EventLog,
        recorder: Recorder,
        say: Callable[[str], None],
    ) -> None:
        self._config, self._events, self._recorder, self._say = config, events, recorder, say
        self._tokens = config.global_batch * config.sequence_length
        self._tflop_per_gpu = meters.flops_per_token(shape, config.sequence_length) * self._tokens / world / 1e12
        self._peak = meters.peak()
        self._pace: float | None = None  # seconds a step, of late

    def step(self, outcome: Outcome) -> None:
        """Tell one step."""
        numbers = self._numbers(outcome)
        self._events.write("step", step=outcome.step, steps=self._config.steps, **numbers)
        self._recorder.record(outcome.step, numbers)
        self._pace = outcome.seconds if self._pace is None else 0.9 * self._pace + 0.1 * outcome.seconds
        last = outcome.step == self._config.steps
        if last or not outcome.updated or outcome.step % self._config.log_interval == 0:
            self._say(self._line(outcome, numbers))

    def _numbers(self, outcome: Outcome) -> dict[str, Any]:
        rate = self._tflop_per_gpu / outcome.seconds
        numbers: dict[str, Any] = {
            "loss": outcome.loss,
            "aux_loss": outcome.aux_loss,
            "lr": outcome.lr,
            "grad_norm": outcome.grad_norm,
            "tokens_per_s": round(self._tokens / outcome.seconds, 1),
            "seconds": round(outcome.seconds, 4),
            "tflops_per_gpu": round(rate, 4),
            "memory_gib": round(outcome.memory, 3),
            "expert_load": round(outcome.load[0], 4),
            "expert_load_worst": round(outcome.load[1], 4),
            "tokens_dropped": round(outcome.dropped, 6),
            "data_wait": round(outcome.data_wait, 4),
            "skipped": outcome.skipped,
        }
        return numbers | ({"mfu": round(rate / self._peak, 4)} if self._peak else {})

    def _line(self, at: Outcome, numbers: dict[str, Any]) -> str:
        pace = self._pace or at.seconds
        parts = [
            f"step {at.step}/{self._config.steps}",
            f"loss {at.loss:.4f}",
            f"aux {at.aux_loss:.3f}",
            f"lr {at.lr:.2e}",
            f"grad norm {at.grad_norm:.3f}",
            f"{numbers['tokens_per_s']:,.0f} tokens/s",
            f"{numbers['tflops_per_gpu']:.3g} TFLOP/s each"
            + (f" (MFU {numbers['mfu']:.1%})" if self._peak else ""),
            f"{at.memory:.1f} GiB",
            f"load {at.load[0]:.2f} to {at.load[1]:.2f}",
            f"dropped {at.dropped:.2%}" if at.dropped else "",
            f"{at.seconds:.2f} s, {at.data_wait:.2f} of it for data"
            if at.data_wait >= 0.01
            else f"{at.seconds:.2f} s",
            f"left {clock((self._config.steps - at.step) * pace)}",
            "" if at.updated else f"SKIPPED: {'a spike' if math.isfinite(at.grad_norm) else 'not finite'}",
        ]
        return " | ".join(part for part in parts if part)

    def evaluation(self, step: int, loss: float) -> None:
        """Tell a validation."""
        ppl = perplexity(loss)
        self._events.write("eval", step=step, loss=loss, perplexity=ppl)
        self._recorder.record(step, {"validation_loss": loss, "validation_perplexity": ppl})
        self._say(f"step {step} | validation loss {loss:.4f} | perplexity {ppl:.2f}")


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def clock(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
