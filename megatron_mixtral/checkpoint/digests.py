"""Checks the digests in a folder's marker before the first step.

A save records a digest of every file, and a conversion of every tensor. The ranks share one reading of all data.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist
from blake3 import blake3

from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights import verification
from megatron_mixtral.weights.shared_work import Workers


def of(path: Path) -> dict[str, Any]:
    """Size and BLAKE3 of one file, computed by all free cores."""
    found = blake3(max_threads=blake3.AUTO)
    found.update_mmap(path)
    return {"bytes": path.stat().st_size, "blake3": found.hexdigest()}


def check(folder: Path, marker: dict[str, Any]) -> None:
    """All ranks: `CheckpointError` on every rank for a file or tensor whose digest differs from `marker`."""
    if "files" in marker:
        _check_files(folder, marker["files"])
    elif "digests" in marker:
        workers = Workers(rank=dist.get_rank(), size=dist.get_world_size())
        collectives.everywhere(lambda: verification.share(folder, marker, workers).check(), failure=CheckpointError)


def _check_files(folder: Path, recorded: dict[str, dict[str, Any]]) -> None:
    largest_first = sorted(recorded, key=lambda name: -recorded[name]["bytes"])
    mine = largest_first[dist.get_rank() :: dist.get_world_size()]
    collectives.raise_alike(_wrong(folder, {n: recorded[n] for n in mine}), failure=CheckpointError)


def _wrong(folder: Path, recorded: dict[str, dict[str, Any]]) -> str | None:
    for name, wanted in recorded.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted["bytes"]:
                return f"{path}: {size} bytes, but {wanted['bytes']} were saved"
            if of(path) != wanted:
                return f"{path}: damaged, its contents differ from what was saved"
        except OSError as error:
            return f"{path}: {error.strerror or error}"
    return None
