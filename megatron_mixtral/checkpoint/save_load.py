"""Saves weights folders and training checkpoints, and loads them at any layout; `weights.folder` finds and marks
them.

Loading is strict: a tensor that is missing, unexpected or of another shape is an error with its name. It is raised
on every rank before anything is read.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from megatron_mixtral import mcore
from megatron_mixtral.checkpoint import digests, writer
from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import CheckpointError, SaveError
from megatron_mixtral.spec.rundir import LATEST, MARKER
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights import tensors
from megatron_mixtral.weights.folder import (
    FORMAT,
    hub_assets,
    read_marker,
    replace_text,
    write_marker,
)
from megatron_mixtral.weights.lora import Lora

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

# The optimizer's state as tensors of the model's own shapes: any layout can load it.
_CONTENT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@dataclass(frozen=True, kw_only=True)
class State:
    """The contents of a training checkpoint besides tensors."""

    step: int | None
    common: dict[str, Any]  # alike on all ranks
    rank: Any  # this rank's own; None if another number of ranks saved it


def verify(folder: Path, shape: MixtralShape, lora: Lora | None = None) -> None:
    """`CheckpointError` unless `folder` is whole in its files, and holds exactly the tensors of `shape`.

    With `lora` those of its adapters instead.
    """
    kind = read_marker(folder).get("kind")
    if kind == "legacy":
        raise CheckpointError(f"{folder}: legacy files, for other programs; convert again without --layout legacy")
    if kind == adapters.KIND and not lora:
        raise CheckpointError(f"{folder}: holds only adapters; convert --to hf merges them into their base")
    _check_contents(folder, _whole(shape, lora))


def _whole(shape: MixtralShape, lora: Lora | None) -> dict[str, tuple[int, ...]]:
    """Name -> global shape of every tensor in a checkpoint of the model."""
    return adapters.shapes(shape, lora) if lora else tensors.shapes(shape)


def _check_contents(folder: Path, wanted: dict[str, tuple[int, ...]]) -> None:
    metadata = _read_metadata(folder)
    _check_files(folder, metadata)
    _check_tensors(folder, metadata, wanted)


def _read_metadata(folder: Path) -> Any:
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise CheckpointError(f"{folder / '.metadata'}: {error!r}") from error


def _check_files(folder: Path, metadata: Any) -> None:
    """Check that every file exists and is long enough for its contents."""
    needed: dict[str, int] = {}
    for entry in metadata.storage_data.values():
        needed[entry.relative_path] = max(needed.get(entry.relative_path, 0), entry.offset + entry.length)
    for name in (writer.COMMON, writer.CONFIG):
        needed.setdefault(name, 1)
    for name, size in sorted(needed.items()):
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            raise CheckpointError(f"{path}: missing")
        if found < size:
            raise CheckpointError(f"{path}: truncated, {found} bytes of {size}")


def _check_tensors(folder: Path, metadata: Any, wanted: dict[str, tuple[int, ...]]) -> None:
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


def _chunks(model: Any) -> list[Any]:
    """This rank's GPTModels: a single one, or a list of chunks."""
    return [unwrap(chunk) for chunk in (model if isinstance(model, list) else [model])]


def _keyed(chunks: list[Any], state: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """`state` of each chunk under upstream's key; the tensors' names don't depend on the key."""
    return {"model" if len(chunks) == 1 else f"model{i}": state(chunk) for i, chunk in enumerate(chunks)}


def _model_state(model: Any) -> dict[str, Any]:
    """The sharded state that a checkpoint of the model holds: only its adapters if it has any."""
    return _part_of_state(model, of_adapters=bool(model.lora))


def _part_of_state(model: Any, *, of_adapters: bool) -> dict[str, Any]:
    state = unwrap(model).sharded_state_dict(metadata=dict(_CONTENT))
    return {name: value for name, value in state.items() if adapters.is_adapter(name) == of_adapters}


def _without_extra_states(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in state.items() if not isinstance(value, ShardedObject)}


def _trained(model: Any) -> dict[str, Any]:
    """The part of it that can have optimizer state."""
    return _without_extra_states(_model_state(model))


def weights_wanted(model: Any) -> dict[str, Any]:
    """The shards that `model` needs from a weights folder: its parameters without adapters."""
    return _without_extra_states(_part_of_state(model, of_adapters=False))


def load_weights(model: Any, folder: Path, *, whole: bool = False) -> None:
    """Fill `model` from a weights folder or training checkpoint of any layout, in the model's dtype.

    If a rank holds several chunks, `model` is their list, here and below. `whole` first reads everything and
    compares the digests. When there is an optimizer already, call its `reload_model_params()` afterwards.
    """
    chunks = _chunks(model)
    _verify_together(folder, chunks[0].shape, whole=whole)
    asked = _keyed(chunks, weights_wanted)
    loaded = _load(asked, folder)
    for name, chunk in zip(asked, chunks, strict=True):
        fill(chunk, loaded[name], folder)


def _verify_together(folder: Path, shape: MixtralShape, lora: Lora | None = None, *, whole: bool) -> None:
    """Run `verify` on every rank and share the error; then compare the digests of the files, each on one rank."""
    collectives.everywhere(lambda: verify(folder, shape, lora), failure=CheckpointError)
    if whole:
        digests.check(folder, read_marker(folder))


def _load(asked: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        with mcore.quiet():
            return dist_checkpointing.load(asked, str(folder), validate_access_integrity=False)
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        name, absent, _ = str(reason).strip("\"'").partition(" from model not in state dict")  # and all that is
        raise CheckpointError(f"{folder}: rank {rank}: {f'it has no {name}' if absent else repr(reason)}") from None


def fill(model: Any, state: dict[str, Any], folder: Path) -> None:
    """Copy the parameters of `state` into `model`; `CheckpointError` if one is missing or unexpected.

    `state` holds only adapters, or everything else.
    """
    result = model.load_state_dict(state, strict=False)
    of_adapters = any(map(adapters.is_adapter, state))
    missing = [
        name
        for name in result.missing_keys
        if "_extra_state" not in name and adapters.is_adapter(name) == of_adapters
    ]
    if missing or result.unexpected_keys:
        raise CheckpointError(f"{folder}: {[*missing, *result.unexpected_keys][0]} doesn't fit the model")


def load_training(model: Any, optimizer: Any, folder: Path) -> State:
    """Parameters, optimizer and the rest of a training checkpoint, resharded to this layout.

    For a model with adapters it loads only those; `load_weights` loads the rest.
    """
    marker = collectives.on_first_rank(lambda: read_marker(folder), failure=CheckpointError)
    chunks = _chunks(model)
    plain = chunks[0]
    if (kind := marker.get("kind")) not in ("training", adapters.KIND):
        raise CheckpointError(f"{folder}: holds only {kind}, and no optimizer to resume from")
    adapters.check_same(folder, marker, plain.lora)
    _verify_together(folder, plain.shape, plain.lora, whole=True)
    state = _keyed(chunks, _trained)
    asked = {**state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True, metadata=dict(_CONTENT))}
    if same_world := marker.get("ranks") == dist.get_world_size():
        asked["rank"] = _rank_object(None)
    loaded = _load(asked, folder)
    for name, chunk in zip(state, chunks, strict=True):
        fill(chunk, loaded[name], folder)
    optimizer.load_state_dict(loaded["optimizer"])
    return State(
        step=marker.get("step"), common=loaded.get("state", {}), rank=loaded["rank"] if same_world else None
    )


def _rank_object(value: Any) -> ShardedObject:
    return ShardedObject("rank_state", value, (dist.get_world_size(),), (dist.get_rank(),))


def save(folder: Path, model: Any, optimizer: Any = None, *, assets: Path | None = None, **more: Any) -> None:
    """Write a complete checkpoint into `folder`, which must not hold one; all ranks call it.

    `config.json` and the tokenizer are copied from the folder `assets`; the other arguments are `begin`'s. Remains
    of an interrupted save under the same name are removed first.
    """
    begin(folder, model, optimizer, assets=read_assets(assets) if assets else {}, **more).write()


def begin(
    folder: Path,
    model: Any,
    optimizer: Any = None,
    *,
    step: int | None = None,
    common: dict[str, Any] | None = None,
    rank_state: Any = None,
    assets: Mapping[str, bytes] = MappingProxyType({}),
    source: dict[str, Any] | None = None,
    group: Any = None,
    copied: bool = False,
) -> "Unwritten":
    """The first part of `save`; the second part may run on a thread with its own `group` of all ranks.

    `copied` copies the present values, so training can continue and change them. `assets` are further files by
    name. It isn't a folder, because an old checkpoint may be removed before this save ends. `common` must be the
    same on all ranks; `rank_state` is each rank's own.
    """
    collectives.on_first_rank(lambda: _claim(folder), failure=SaveError)
    chunks = _chunks(model)
    content: dict[str, Any] = {**_keyed(chunks, _model_state), **_for_upstream(step)}
    if optimizer is not None:
        content["optimizer"] = optimizer.sharded_state_dict(_keyed(chunks, _trained), metadata=dict(_CONTENT))
        content["rank"] = _rank_object(rank_state)
        content["state"] = common or {}
    plain = chunks[0]
    marker = {
        "format": FORMAT,
        "kind": adapters.KIND if plain.lora else "weights" if optimizer is None else "training",
        "step": step,
        "dtype": str(next(plain.parameters()).dtype).removeprefix("torch."),
        "source": source or {},
        "ranks": dist.get_world_size(),
        "layout": _layout(plain.config),
        **(adapters.describe(plain.lora, plain.base) if plain.lora else {}),
    }
    return Unwritten(
        folder=folder,
        content=writer.content(content, dict(_CONTENT), copied=copied),
        wanted=_whole(plain.shape, plain.lora),
        marker=marker,
        assets=assets,
        group=group,
    )


def read_assets(folder: Path) -> dict[str, bytes]:
    """The files in `folder` that describe the model and its tokenizer, by name."""
    return {path.name: path.read_bytes() for path in hub_assets(folder)}


@dataclass(frozen=True, kw_only=True)
class Unwritten:
    """A save that has begun."""

    folder: Path
    content: writer.Content
    wanted: dict[str, tuple[int, ...]]
    marker: dict[str, Any]
    assets: Mapping[str, bytes]
    group: Any

    def write(self) -> int:
        """Write it and mark it complete; returns its bytes. A failure on one rank is a `SaveError` on all."""
        writer.write(self.folder, self.content, self.group)
        found = collectives.everywhere(self._digests, failure=SaveError, group=self.group)
        files = {name: entry for of_rank in found for name, entry in of_rank.items()}
        collectives.on_first_rank(lambda: self._finish(files), failure=SaveError, group=self.group)
        return sum(entry["bytes"] for entry in files.values())

    def _digests(self) -> dict[str, dict[str, Any]]:
        """Digests of the files that this rank wrote."""
        mine = list(self.folder.glob(f"__{dist.get_rank()}_*.distcp"))
        if dist.get_rank() == 0:
            mine += [self.folder / name for name in (".metadata", writer.COMMON, writer.CONFIG)]
        return {path.name: digests.of(path) for path in mine}

    def _finish(self, files: dict[str, dict[str, Any]]) -> None:
        _check_contents(self.folder, self.wanted)
        for name, data in self.assets.items():
            (self.folder / name).write_bytes(data)
        if "config.json" in self.assets:
            files["config.json"] = digests.of(self.folder / "config.json")
        write_marker(self.folder, self.marker | {"files": files})
        latest = "release" if self.marker["step"] is None else str(self.marker["step"])
        replace_text(self.folder.parent / LATEST, latest)


def _claim(folder: Path) -> None:
    if (folder / MARKER).exists():
        raise CheckpointError(f"{folder}: already holds a complete checkpoint")
    if folder.is_file():
        raise CheckpointError(f"{folder}: a file, but a checkpoint must be saved here; move it away")
    if folder.exists():
        # It is renamed before it is removed, so remains of an interrupted save can't be mixed with the next save.
        rest = folder.with_name(f".{folder.name}.unfinished-{os.getpid()}")
        folder.rename(rest)
        shutil.rmtree(rest)
    folder.mkdir(parents=True)


def _layout(config: Any) -> dict[str, int]:
    return {
        "tensor": config.tensor_model_parallel_size,
        "pipeline": config.pipeline_model_parallel_size,
        "virtual_pipeline": config.virtual_pipeline_model_parallel_size or 1,
        "expert": config.expert_model_parallel_size,
        "expert_tensor": config.expert_tensor_parallel_size,
        "context": config.context_parallel_size,
    }


def _for_upstream(step: int | None) -> dict[str, Any]:
    """Entries that upstream Megatron's own loader needs in every checkpoint."""
    return {"checkpoint_version": 3.0, "iteration": step or 0}
