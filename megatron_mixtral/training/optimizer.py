"""Builds megatron-core's data parallelism, optimizer and learning-rate schedule for one model.

Parameters change only in `step`, and don't change if a gradient isn't finite.
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
    """The wrapped model chunks of this rank, and their optimizer."""

    chunks: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler


def build(config: FinetuneConfig, *models: torch.nn.Module) -> Optimization:
    """Wrap `models`, this rank's chunks with their present weights, and make the optimizer and schedule."""
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=config.overlap_grad_reduce,
        overlap_param_gather=config.overlap_param_gather and config.overlap_grad_reduce,
        align_param_gather=len(models) > 1,  # the schedule of several chunks gathers for all stages at once
    )
    # Each chunk after the first is one bucket: it is sent while other chunks compute.
    chunks = [DistributedDataParallel(m.config, settings, m, disable_bucketing=i > 0) for i, m in enumerate(models)]
    schedule: Any = models[0].config  # the configuration that all modules share during a step
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
    """Give torch's Adam its zero state before the first step; other Adams make it themselves.

    megatron-core describes the tensors to save and load by the existing state.
    """
    for part in optimizer.chained_optimizers:
        if not isinstance(part.optimizer, torch.optim.Adam):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}


def _speed_up(chunks: list[DistributedDataParallel], optimizer: Any) -> None:
    """Use the kernels: weight gradients are added to their buffers, and the update reads memory once."""
    from megatron_mixtral.kernels import adam, wgrad  # needs triton, which every fused model has

    for chunk in chunks:
        compat.accumulate_in_place(chunk, wgrad.extension)
    compat.norms_without_waiting()
    for part in optimizer.chained_optimizers:
        plain = type(part) is DistributedOptimizer and type(part.optimizer) is torch.optim.AdamW
        if plain and not any(part.model_fp32_groups):
            part.optimizer = adam.FusedAdamW(part.optimizer.param_groups, compat.model_shards(part))
            part._copy_main_params_to_model_params = lambda: None  # the update has already written them


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
    """Steps of warm-up: as asked, but the last step is always part of the cosine."""
    return min(config.warmup_steps, max(config.steps - 1, 0))


def zero_grad(parts: Optimization) -> None:
    for chunk in parts.chunks:
        chunk.zero_grad_buffer()
    parts.optimizer.zero_grad()


def set_step(parts: Optimization, step: int) -> float:
    """Set and return the learning rate of step `step` (from 1); it depends only on the step."""
    parts.scheduler.num_steps = step
    parts.scheduler.step(0)
    return parts.scheduler.get_lr({})


def settle(parts: Optimization) -> None:
    """Gather all parameters of the last update on every rank. Call it before anything but a training step reads
    them.
    """
    for chunk in parts.chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


class Spikes:
    """Finds gradient norms that are `factor` times the usual one, the median of recent steps; 0 turns it off."""

    WINDOW = 64

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self._norms: deque[float] = deque(maxlen=self.WINDOW)

    def refuse(self, norm: float) -> bool:
        """Whether to skip an update of this norm; otherwise the norm joins the median."""
        usual = statistics.median(self._norms) if len(self._norms) >= self.WINDOW // 4 else math.inf
        if self._factor and norm > self._factor * usual:
            return True
        self._norms.append(norm)
        return False


@torch.no_grad()
def step(parts: Optimization, spikes: Spikes | None = None) -> tuple[bool, float]:
    """Clip and update; returns whether parameters changed, and the gradient norm over all ranks.

    Every rank gets the same norm, so all ranks skip an update or none does.
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
        if hasattr(part.optimizer, "scale"):  # our optimizer clips during the update
            part.optimizer.scale = min(1.0, part.config.clip_grad / (norm + 1e-6))
        else:
            clip_grad_by_total_norm_fp32(parameters, part.config.clip_grad, norm)
    return optimizer.step_with_ready_grads(), norm
