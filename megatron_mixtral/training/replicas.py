"""Checks that data-parallel replicas hold the same parameters, at low cost.

Replicas compute the same update from the same sum, so a GPU that computes wrongly shows as a difference.
"""

import torch
import torch.distributed as dist

from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import JobError
from megatron_mixtral.training import optimizer

from megatron.core import parallel_state


def check(parts: optimizer.Optimization, step: int) -> None:
    """`JobError` on every rank, naming the ranks and a parameter that differs from its copies."""
    optimizer.settle(parts)
    expert = parallel_state.get_expert_data_parallel_group()
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    named = [item for chunk in parts.chunks for item in chunk.module.named_parameters()]
    problem = None
    for group, mine in ((dense, False), (expert, True)):
        chosen = [(name, value) for name, value in named if (".experts." in name) == mine]
        problem = problem or _difference(chosen, group)
    collectives.raise_alike(
        problem and f"step {step}: {problem}; the newest checkpoint may hold it already", failure=JobError
    )


@torch.no_grad()
def _difference(named: list[tuple[str, torch.nn.Parameter]], group: dist.ProcessGroup) -> str | None:
    """The first parameter whose bits aren't the same on all ranks of `group`."""
    if not named or group.size() == 1:
        return None
    mine = torch.stack([_hash(value) for _, value in named])
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine, group=group)
    ranks = dist.get_process_group_ranks(group)
    for rank, theirs in zip(ranks, everyone, strict=True):
        if (wrong := (theirs != everyone[0]).nonzero()).numel():
            return f"parameter {named[int(wrong[0])][0]} differs between ranks {ranks[0]} and {rank}"
    return None


def _hash(value: torch.Tensor) -> torch.Tensor:
    """A sum over the bits, weighted by position so swapped numbers are noticed. It needs little memory, and wraps
    around.
    """
    bits = value.detach().flatten().view({2: torch.int16, 4: torch.int32}[value.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in bits.split(1 << 22):
        total = total * 31 + (part * (torch.arange(part.numel(), device=bits.device) * 2 + 1)).sum()
    return total
