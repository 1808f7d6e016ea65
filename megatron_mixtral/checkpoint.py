"""Weights folders and training checkpoints: save one, load it at any layout; `weights_folder` finds and marks them.

Loading is strict: a tensor missing, unexpected or of another shape is an error with its name, raised alike on every
rank before anything is read.
"""

import os
import shutil
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_mixtral import mcore, tensors
from megatron_mixtral.config import MixtralShape
from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.weights_folder import (
    FORMAT,
    LATEST,
    MARKER,
    complete,
    hub_assets,
    newest,
    prune,
    read_marker,
    refuse_foreign,
    replace_text,
    resolve,
    step_folder,
    write_marker,
)

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

__all__ = [
    "complete",
    "load_training",
    "load_weights",
    "newest",
    "prune",
    "resolve",
    "save",
    "step_folder",
    "verify",
]

# The optimizer's state as tensors of the model's own shapes: any layout can load it.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, kw_only=True)
class State:
    """What a training checkpoint holds besides tensors."""

    step: int | None
    common: dict[str, Any]  # alike on all ranks
    rank: Any  # this rank's own; None when it was saved by another number of ranks


def verify(folder: Path, shape: MixtralShape) -> None:
    """`CheckpointError` unless `folder` is ours, whole in its files, and holds exactly the tensors of `shape`."""
    if read_marker(folder).get("kind") == "legacy":
        raise CheckpointError(f"{folder}: legacy files, for other programs; convert again without --layout legacy")
    refuse_foreign(folder)
    _check_contents(folder, shape)


def _check_contents(folder: Path, shape: MixtralShape) -> None:
    metadata = _read_metadata(folder)
    _check_files(folder, metadata)
    _check_tensors(folder, metadata, shape)


def _read_metadata(folder: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{folder / '.metadata'}: {error!r}") from error


def _check_files(folder: Path, metadata: Any) -> None:
    """Every file there and as long as its contents need."""
    needed: dict[str, int] = {}
    for entry in metadata.storage_data.values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name in ("common.pt", "metadata.json"):
        needed.setdefault(name, 1)
    for name, size in sorted(needed.items()):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise CheckpointError(f"{path}: missing")
        if found < size:
            raise CheckpointError(f"{path}: truncated, {found} bytes of {size}")


def _check_tensors(folder: Path, metadata: Any, shape: MixtralShape) -> None:
    wanted = tensors.shapes(shape)
    stored_tensors = {name: entry for name, entry in metadata.state_dict_metadata.items() if hasattr(entry, "size")}
    found = {name: entry for name, entry in stored_tensors.items() if not name.startswith("optimizer.")}
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(f"{folder}: tensor {missing[0]} missing ({len(missing)} in all)")
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(f"{folder}: unexpected tensor {extra[0]} ({len(extra)} in all)")
    for name, size in wanted.items():
        stored = tuple(found[name].size)
        padded = name in tensors.PADDED and stored[0] >= size[0] and stored[1:] == size[1:]
        if stored != size and not padded:
            raise CheckpointError(f"{folder}: tensor {name} has shape {stored}, the model needs {size}")
    for name, entry in stored_tensors.items():
        parts, whole = sum(prod(chunk.sizes) for chunk in entry.chunks), prod(entry.size)
        if parts != whole:
            raise CheckpointError(f"{folder}: tensor {name} has {parts} of its {whole} elements")


def unwrap(model: Any) -> Any:
    """The GPTModel inside megatron-core's data-parallel wrapper."""
    while hasattr(model, "module"):
        model = model.module
    return model


def _model_state(model: Any) -> dict[str, Any]:
    return unwrap(model).sharded_state_dict(metadata=dict(_CONTENT))


def _without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def weights_wanted(model: Any) -> dict[str, Any]:
    """What `model` asks of a weights folder: its parameters as shards of the whole."""
    return _without_extra_states(_model_state(unwrap(model)))


def load_weights(model: Any, folder: Path) -> None:
    """Fill `model` from a weights folder or training checkpoint, whatever layout wrote it, in the model's dtype.

    When there is an optimizer already, call its `reload_model_params()` afterwards.
    """
    model = unwrap(model)
    verify(folder, model.shape)
    asked = {"model": weights_wanted(model)}
    fill(model, _load(asked, folder)["model"], folder)


def _load(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    with mcore.quiet():
        return dist_checkpointing.load(asked, str(folder), validate_access_integrity=False)


def fill(model: Any, state: dict[str, Any], folder: Path) -> None:
    """Give `model` the parameters of `state`; `CheckpointError` when one is missing or has no place."""
    result = model.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if "_extra_state" not in name]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{folder}: {[*missing, *result.unexpected_keys][0]} doesn't fit the model")


def load_training(model: Any, optimizer: Any, folder: Path) -> State:
    """Parameters, optimizer and the rest of a training checkpoint, resharded to this layout."""
    marker = read_marker(folder)
    if marker["kind"] != "training":
        raise CheckpointError(f"{folder}: holds {marker['kind']} alone, no optimizer to resume")
    plain = unwrap(model)
    verify(folder, plain.shape)
    state = weights_wanted(plain)
    asked: dict[str, Any] = {
        "model": state,
        "optimizer": optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(_CONTENT)),
    }
    if same_world := marker["ranks"] == dist.get_world_size():
        asked["rank"] = _rank_object(None)
    loaded = _load(asked, folder)
    fill(plain, loaded["model"], folder)
    optimizer.load_state_dict(loaded["optimizer"])
    return State(step=marker["step"], common=loaded.get("state", {}), rank=loaded["rank"] if same_world else None)


def _rank_object(value: Any) -> ShardedObject:
    return ShardedObject("rank_state", value, (dist.get_world_size(),), (dist.get_rank(),))


def save(
    folder: Path,
    model: Any,
    optimizer: Any = None,
    *,
    step: int | None = None,
    common: dict[str, Any] | None = None,
    rank_state: Any = None,
    assets: Path | None = None,
    source: dict[str, Any] | None = None,
) -> None:
    """Write a complete checkpoint into `folder`, which must not hold one; all ranks call it.

    `common` must be alike on all ranks, `rank_state` is each one's own. `assets` is the folder whose `config.json`
    and tokenizer go along. What an interrupted save left under the same name is cleared first.
    """
    _on_first_rank(lambda: _claim(folder))
    model_state = _model_state(model)
    content: dict[str, Any] = {"model": model_state, **_for_upstream(model, step)}
    if optimizer is not None:
        content["optimizer"] = optimizer.sharded_state_dict(
            _without_extra_states(model_state), metadata=dict(_CONTENT)
        )
        content["rank"] = _rank_object(rank_state)
        content["state"] = common or {}
    mcore.save_sharded(content, folder, content_metadata=dict(_CONTENT))
    marker = {
        "format": FORMAT,
        "kind": "weights" if optimizer is None else "training",
        "step": step,
        "dtype": str(next(unwrap(model).parameters()).dtype).removeprefix("torch."),
        "source": source or {},
        "ranks": dist.get_world_size(),
        "layout": _layout(unwrap(model).config),
    }
    _on_first_rank(lambda: _finish(folder, unwrap(model).shape, marker, assets))


def _on_first_rank(action: Any) -> None:
    """Run on rank 0 while the others wait; its error is everyone's."""
    told: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except (OSError, CheckpointError) as error:
            told = [str(error)]
    dist.broadcast_object_list(told, src=0, device=mcore.device())
    if told[0] is not None:
        raise CheckpointError(told[0])


def _claim(folder: Path) -> None:
    if (folder / MARKER).exists():
        raise CheckpointError(f"{folder}: already holds a complete checkpoint")
    if folder.exists():
        # Renamed before it's removed, so that nothing of an interrupted save can be mistaken for the next one's.
        rest = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
        folder.rename(rest)
        shutil.rmtree(rest)
    folder.mkdir(parents=True)


def _finish(folder: Path, shape: MixtralShape, marker: dict[str, Any], assets: Path | None) -> None:
    _check_contents(folder, shape)
    if assets is not None:
        for path in hub_assets(assets):
            shutil.copyfile(path, folder / path.name)
    write_marker(folder, marker)
    latest = "release" if marker["step"] is None else str(marker["step"])
    replace_text(folder.parent / LATEST, latest)


def _layout(config: Any) -> dict[str, int]:
    return {
        "tensor": config.tensor_model_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
        "expert": config.expert_model_parallel_size,
        "expert_tensor": config.expert_tensor_parallel_size,
        "context": config.context_parallel_size,
    }


def _for_upstream(model: Any, step: int | None) -> dict[str, Any]:
    """What upstream Megatron's own loader looks up in every checkpoint."""
    return {"checkpoint_version": 3.0, "iteration": step or 0}
