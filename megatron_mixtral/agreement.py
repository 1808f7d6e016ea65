"""Ranks come to one decision together: what one of them finds wrong ends them all, with the same words.

Every function here is called by all ranks, or the others wait for ever.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_mixtral import mcore
from megatron_mixtral.errors import InputError, JobError

T = TypeVar("T")


def on_first_rank(action: Callable[[], T], *, failure: type[JobError] = JobError) -> T:
    """What `action` returned on rank 0, on every rank; its error is everyone's, an OSError as `failure`."""
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except JobError as error:
            told[1] = error
        except OSError as error:
            told[1] = failure(str(error))
    dist.broadcast_object_list(told, src=0, device=mcore.device())
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(mine: T, group: Any = None) -> list[T]:
    """What each rank has to say, by rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def raise_alike(problem: str | None, *, failure: type[JobError] = InputError) -> None:
    """On every rank, `failure` with what the first rank that has one calls the problem."""
    if found := [said for said in gathered(problem) if said]:
        raise failure(found[0])


def summed(values: list[float]) -> list[float]:
    """Each number's sum over all ranks."""
    import torch

    everyone = torch.tensor(values, dtype=torch.float64, device=mcore.device())
    dist.all_reduce(everyone)
    return everyone.tolist()
