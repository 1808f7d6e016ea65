"""Memory of every rank of a group that the others write to: over NVLink, or for tests through shared files.

No NVLink multicast is asked for: where it is forbidden, making its objects alone can harm.
"""

import os
import socket
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mixtral.kernels.peer_words import Inboxes

MULTICAST = "TORCH_SYMM_MEM_DISABLE_MULTICAST"


def inboxes(group: dist.ProcessGroup, device: torch.device, *, rows: int, words: int) -> Inboxes | None:
    """Of that many words a row, from each rank; None where some rank's memory can't be reached from another.

    All ranks of the group call it.
    """
    shared = _shared(group, device, 2 * group.size() * rows * words)
    if shared is None:
        return None
    return Inboxes(
        addresses=torch.tensor(shared[1], dtype=torch.int64, device=device),
        calls=torch.zeros(rows, dtype=torch.int32, device=device),
        memory=shared[0],
        rank=group.rank(),
        ranks=group.size(),
        rows=rows,
    )


def _shared(group: dist.ProcessGroup, device: torch.device, size: int) -> tuple[Tensor, list[int]] | None:
    """Memory of so many int64, zeros, and the addresses of all ranks' here."""
    where: list[Any] = [None] * group.size()
    dist.all_gather_object(where, (socket.gethostname(), device.index), group=group)
    if device.type == "cpu":
        shared = _through_files(group, size)
    elif _reachable(where):
        shared = _over_nvlink(group, device, size)
    else:
        return None
    dist.barrier(group)  # nobody writes before all have cleared theirs
    return shared


def _reachable(where: list[tuple[str, int]]) -> bool:
    """Whether all ranks, the same everywhere, have GPUs of one machine that read each other's memory."""
    hosts, devices = zip(*where, strict=True)
    if len(set(hosts)) > 1 or len(set(devices)) < len(devices) or max(devices) >= torch.cuda.device_count():
        return False
    return all(torch.cuda.can_device_access_peer(a, b) for a in devices for b in devices if a != b)


def _over_nvlink(group: dist.ProcessGroup, device: torch.device, size: int) -> tuple[Tensor, list[int]]:
    os.environ.setdefault(MULTICAST, "1")
    from torch.distributed import _symmetric_memory  # here: it isn't needed, nor there, on CPU

    memory = _symmetric_memory.empty(size, dtype=torch.int64, device=device)
    memory.zero_()
    torch.cuda.synchronize()
    handle = _symmetric_memory.rendezvous(memory, group.group_name)
    shift = memory.data_ptr() - handle.buffer_ptrs[group.rank()]
    return memory, [int(base) + shift for base in handle.buffer_ptrs]


_mapped: list[Tensor] = []  # files of other ranks, for as long as this process


def _through_files(group: dist.ProcessGroup, size: int) -> tuple[Tensor, list[int]]:
    folder: list[Any] = [tempfile.mkdtemp(prefix="inboxes") if group.rank() == 0 else None]
    dist.broadcast_object_list(folder, src=dist.get_process_group_ranks(group)[0], group=group)
    paths = [os.path.join(folder[0], str(rank)) for rank in range(group.size())]
    own = torch.from_file(paths[group.rank()], shared=True, size=size, dtype=torch.int64)
    own.zero_()
    dist.barrier(group)
    parts = [
        own if rank == group.rank() else torch.from_file(path, shared=True, size=size, dtype=torch.int64)
        for rank, path in enumerate(paths)
    ]
    _mapped.extend(parts)
    dist.barrier(group)
    os.unlink(paths[group.rank()])
    dist.barrier(group)
    if group.rank() == 0:
        os.rmdir(folder[0])
    return own, [part.data_ptr() for part in parts]
