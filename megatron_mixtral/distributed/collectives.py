"""Collective decisions: an error on one rank is raised on all ranks, with the same message.

All ranks of the group must call these functions, otherwise the others wait for ever.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.mcore import ranks

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], *, failure: type[JobError] = JobError, group: Any = None) -> T:
    """Run `action` on rank 0 and return its result on every rank; its error is raised on all ranks, an OSError as
    `failure`.
    """
    told = [_tried(action, failure) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0, group=group, device=None if group else ranks.device())
    return _result(told[0])


def everywhere(action: Callable[[], T], *, failure: type[JobError] = JobError, group: Any = None) -> list[T]:
    """Run `action` on every rank and return the results by rank; the first rank's error is raised on all."""
    tried = gathered(_tried(action, failure), group)
    failed = next((t for t in tried if t[1] is not None), None)
    return [_result(failed or t) for t in tried]


def raise_alike(problem: str | None, *, failure: type[JobError] = InputError) -> None:
    """Raise `failure` on every rank, with the problem of the first rank that has one."""
    if found := [said for said in gathered(problem) if said]:
        raise failure(found[0])


def gathered(mine: T, group: Any = None) -> list[T]:
    """Each rank's value, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def summed(values: list[float]) -> list[float]:
    """Each number's sum over all ranks."""
    everyone = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(everyone)
    return everyone.tolist()


def largest(values: list[float]) -> list[float]:
    """Each number's largest over all ranks."""
    everyone = torch.tensor(values, dtype=torch.float64, device=ranks.device())
    dist.all_reduce(everyone, op=dist.ReduceOp.MAX)
    return everyone.tolist()


def _tried(action: Callable[[], T], failure: type[JobError]) -> tuple[T | None, JobError | None]:
    try:
        return action(), None
    except JobError as error:
        return None, error
    except OSError as error:
        return None, failure(f"rank {dist.get_rank()}: {error}")


def _result(tried: Any) -> Any:
    if tried[1] is not None:
        raise tried[1]
    return tried[0]
