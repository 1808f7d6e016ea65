"""The digest of every file of a checkpoint: recorded in its marker at the save, compared before the first step.

Ranks share the files, so that a checkpoint is read through once, at the speed of memory or of the file system.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from blake3 import blake3

from megatron_mixtral import agreement
from megatron_mixtral.errors import CheckpointError


def of(path: Path) -> dict[str, Any]:
    """Size and BLAKE3 of one file, by all cores that are free."""
    found = blake3(max_threads=blake3.AUTO)
    found.update_mmap(path)
    return {"bytes": path.stat().st_size, "blake3": found.hexdigest()}


def check(folder: Path, recorded: dict[str, dict[str, Any]]) -> None:
    """All ranks: `CheckpointError` on each for a file of `recorded` that isn't as it was."""
    largest_first = sorted(recorded, key=lambda name: -recorded[name]["bytes"])
    mine = largest_first[dist.get_rank() :: dist.get_world_size()]
    agreement.raise_alike(_wrong(folder, {n: recorded[n] for n in mine}), failure=CheckpointError)


def _wrong(folder: Path, recorded: dict[str, dict[str, Any]]) -> str | None:
    for name, wanted in recorded.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{path}: {size} bytes, but {wanted['bytes']} were saved"
            if of(path) != wanted:
                return f"{path}: damaged, its contents aren't those that were saved"
        except OSError as error:
            return f"{path}: {error.strerror or error}"
    return None
