"""Writes megatron-core's state dicts with torch's own writer, in both versions of megatron-core.

megatron-core's writer starts two processes for each rank and a manager for their results. torch's works in this
process, on the calling thread.
"""

import errno
import io
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mixtral import mcore
from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import SaveError
from megatron_mixtral.mcore import compat

from megatron.core.dist_checkpointing import core, mapping, state_dict_utils
from megatron.core.dist_checkpointing.strategies import torch as strategies

COMMON, CONFIG = "common.pt", "metadata.json"
FULL = 1 << 20  # free bytes below which a disk counts as full


@dataclass(frozen=True, kw_only=True)
class Content:
    """The contents to write: this rank's shards, and the common part as bytes, the same on all ranks."""

    shards: dict[str, Any]
    common: bytes


def content(state: dict[str, Any], metadata: dict[str, Any], *, copied: bool) -> Content:
    """`state` for torch's writer; all ranks call it. `copied` makes a copy, if values may change before they are
    written.
    """
    with mcore.quiet():
        sharded, common = state_dict_utils.save_preprocess({**state, "content_metadata": metadata}, True)
    if compat.COMMON_AMONG_TENSORS:  # our checkpoints have the file too, so both versions can read them
        sharded["common_state"] = mapping.ShardedObject("common_state", common, (1,), (0,), dist.get_rank())
    flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded, True)
    if copied:
        for shard in (s for shards in flat.values() for s in shards if isinstance(s, mapping.ShardedTensor)):
            shard.data = shard.data.detach().to("cpu", copy=True)
    stream = io.BytesIO()
    torch.save(common, stream)
    return Content(shards=strategies.mcore_to_pyt_state_dict(flat, False), common=stream.getvalue())


def write(folder: Path, what: Content, group: Any = None) -> None:
    """Write all ranks' shards into `folder`; `SaveError` on every rank names the first rank that failed."""
    collectives.on_first_rank(lambda: _write_common(folder, what.common), failure=SaveError, group=group)
    try:
        with mcore.quiet():
            checkpoint.save(
                what.shards,
                storage_writer=checkpoint.FileSystemWriter(folder),
                planner=strategies.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
                process_group=group,
            )
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        raise SaveError(f"{folder}: rank {rank}: {reason}{_said_of_room(folder)}") from None


def _said_of_room(folder: Path) -> str:
    """The message for a full disk, where torch's writer only says "unexpected pos 704 vs 598"."""
    return f": {os.strerror(errno.ENOSPC)}" if shutil.disk_usage(folder).free < FULL else ""


def _write_common(folder: Path, common: bytes) -> None:
    (folder / COMMON).write_bytes(common)
    core.save_config(core.CheckpointingConfig("torch_dist", 1), str(folder))
