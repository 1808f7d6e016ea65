"""megatron-core's data parallelism, optimizer and learning-rate schedule, put together for one model.

`step` is the one place where parameters change, and it changes none when a gradient isn't finite.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch

from megatron_mixtral.mcore import compat
from megatron_mixtral.spec.jobs import FinetuneConfig

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """The wrapped model chunks of this rank with what updates them."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def build(config: FinetuneConfig, *models: torch.nn.Module) -> Optimization:
    """Wrap `models`, this rank's chunks with the weights they have now, and make their optimizer and schedule."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather and config.overlap_grad_reduce,
        align_param_gather=len(models) > 1,  # the schedule of several chunks gathers for all stages at once
    )
    # Chunks after the first are one bucket each: they have other chunks' arithmetic to be sent behind.
    chunks = [DistributedDataParallel(m.config, settings, m, disable_bucketing=i > 0) for i, m in enumerate(models)]
    schedule: Any = models[0].config  # whose settings are everyone's while a step runs
    schedule.finalize_model_grads_func = finalize_model_grads
    if settings.overlap_grad_reduce:
        schedule.no_sync_func = [c.no_sync for c in chunks] if len(chunks) > 1 else chunks[0].no_sync
    if settings.overlap_param_gather and settings.align_param_gather:
        schedule.param_sync_func = [c.start_param_sync for c in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=config.lr,
            min_lr=config.min_lr,
            weight_decay=config.weight_decay,
            clip_grad=config.clip_grad,
            bf16=config.precision == "bf16",
            params_dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=settings.overlap_param_gather,
        ),
        chunks,
    )
    if models[0].fused and config.precision == "bf16":
        _speed_up(chunks, optimizer)
    _allocate_state(optimizer)
    return Optimization(chunks=chunks, optimizer=optimizer, scheduler=_scheduler(config, optimizer))


def _allocate_state(optimizer: Any) -> None:
    """Give torch's Adam the zero state of its first step; other Adams make it by themselves.

    megatron-core describes what is saved, and what it wants loaded, from the state that is there.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _speed_up(chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """Weight gradients added where they are kept, and an update in one pass over memory."""
    from megatron_mixtral.kernels import adam, wgrad  # needs triton, which is there wherever a model is fused

    for chunk in chunks:
        compat.accumulate_in_place(chunk, wgrad.extension)
    compat.norms_without_waiting()
    for part in optimizer.chained_optimizers:
        plain = type(part) is DistributedOptimizer and type(part.optimizer) is torch.optim.AdamW
        if plain and not any(part.model_fp32_groups):
            part.optimizer = adam.FusedAdamW(part.optimizer.param_groups, compat.model_shards(part))
            part._copy_main_params_to_model_params = lambda: None  # the update has written them already


def _scheduler(config: FinetuneConfig, optimizer: Any) -> OptimizerParamScheduler:
    """Linear warm-up, then a cosine down to min_lr at the last step."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup(config),
        lr_decay_steps=max(config.steps, 1),
        lr_decay_style="cosine",
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=config.steps,
        wd_incr_style="constant",
    )


def warmup(config: FinetuneConfig) -> int:
    """Steps of warm-up: what was asked for, but the last step is always of the cosine."""
    return min(config.warmup_steps, max(config.steps - 1, 0))


def zero_grad(parts: Optimization) -> None:
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()


def set_step(parts: Optimization, step: int) -> float:
    """Set the learning rate of step `step` (from 1), a function of the step alone, and return it."""
    parts.scheduler.num_steps = step
    parts.scheduler.step(0)
    return parts.scheduler.get_lr({})


def settle(parts: Optimization) -> None:
    """Let every rank have all parameters of the last update, before anything but a training step reads them."""
    for chunk in parts.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


class Spikes:
    """Tells gradient norms that are `factor` times the usual one, the median of the last so many; 0 tells none."""

    WINDOW = 64

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: deque[float] = deque(maxlen=self.WINDOW)

    def refuse(self, norm: float) -> bool:
        """Whether an update of this norm is to be left out; when it isn't, it counts as usual from now on."""
        usual = statistics.median(self._norms) if len(self._norms) >= self.WINDOW // 4 else math.inf
        if self._factor and norm > self._factor * usual:
            return True
        self._norms.append(norm)
        return False


@torch.no_grad()
def step(parts: Optimization, spikes: Spikes | None = None) -> tuple[bool, float]:
    """Clip and update; (whether parameters changed, gradient norm over all ranks).

    The norm is the same number on every rank, so all of them skip an update or none does.
    """
    optimizer = parts.optimizer
    if optimizer.prepare_grads():
        return False, math.inf
    norm = float(optimizer.get_grad_norm())
    if not math.isfinite(norm) or (spikes and spikes.refuse(norm)):
        return False, norm
    for part in optimizer.chained_optimizers:
        if part.config.clip_grad <= 0 or not (parameters := part.get_parameters()):
            continue
        if hasattr(part.optimizer, "scale"):  # ours clips while it updates
            part.optimizer.scale = min(1.0, part.config.clip_grad / (norm + 1e-6))
        else:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    return optimizer.step_with_ready_grads(), norm
