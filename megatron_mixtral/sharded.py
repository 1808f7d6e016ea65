"""megatron-core's state dicts in the form that torch's own writer takes, in both versions of it.

megatron-core's writer starts two processes a rank and a manager for their results; torch's works in this process,
on whatever thread it is called.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mixtral import agreement, mcore
from megatron_mixtral.errors import SaveError

from megatron.core.dist_checkpointing import core, mapping, serialization, state_dict_utils
from megatron.core.dist_checkpointing.strategies import torch as strategies

COMMON, CONFIG = "common.pt", "metadata.json"


@dataclass(frozen=True, kw_only=True)
class Content:
    """What is to be written: this rank's shards, and the rest, alike on all ranks, already as bytes."""

    shards: dict[str, Any]
    common: bytes


def content(state: dict[str, Any], metadata: dict[str, Any], *, copied: bool) -> Content:
    """`state` as torch's writer takes it; all ranks call it. `copied` where it may change before it's written."""
    with mcore.quiet():
        sharded, common = state_dict_utils.save_preprocess({**state, "content_metadata": metadata}, True)
    if not hasattr(serialization, "get_default_save_common_strategy"):
        # Newer versions keep the common part among the tensors, older ones in its file: ours has both.
        sharded["common_state"] = mapping.ShardedObject("common_state", common, (1,), (0,), dist.get_rank())
    flat, _, _ = strategies._replace_state_dict_keys_with_sharded_keys(sharded, True)
    if copied:
        for shard in (s for shards in flat.values() for s in shards if isinstance(s, mapping.ShardedTensor)):
            shard.data = shard.data.detach().to("cpu", copy=True)
    stream = io.BytesIO()
    torch.save(common, stream)
    return Content(shards=strategies.mcore_to_pyt_state_dict(flat, False), common=stream.getvalue())


def write(folder: Path, what: Content, group: Any = None) -> None:
    """All ranks write their shards into `folder`; `SaveError` on each of them names the first that couldn't."""
    agreement.on_first_rank(lambda: _write_common(folder, what.common), failure=SaveError, group=group)
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
        raise SaveError(f"{folder}: rank {rank}: {reason}") from None


def _write_common(folder: Path, common: bytes) -> None:
    (folder / COMMON).write_bytes(common)
    core.save_config(core.CheckpointingConfig("torch_dist", 1), str(folder))
