"""Readers of the pickles in a checkpoint that build known types alone: what a folder holds never runs as code.

torch unpickles `.metadata` and the objects among the tensors as they come, whatever they name. Here each name is
looked up in a list first, in the same bytes that are then built.
"""

import io
import pickle
from typing import Any

import torch
from numpy import dtype, dtypes, ndarray
from torch.distributed.checkpoint import FileSystemReader, default_planner, filesystem, metadata

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray  # type: ignore[no-redef]

# What only holds values: its construction does nothing else, whatever its arguments are.
KNOWN = {
    "builtins": ("set", "frozenset"),
    "collections": ("OrderedDict",),
    "pathlib": ("PosixPath", "PurePosixPath"),
    "pathlib._local": ("PosixPath", "PurePosixPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    metadata.__name__: (
        *("ChunkStorageMetadata", "_MEM_FORMAT_ENCODING", "TensorProperties", "TensorStorageMetadata"),
        *("BytesStorageMetadata", "StorageMeta", "Metadata", "MetadataIndex"),
    ),
    filesystem.__name__: ("_StorageInfo", "_StoragePrefix"),
}
# numpy's random state, as its versions name it.
ARRAYS: list[Any] = [
    *(ndarray, dtype, dtypes.UInt32DType, multiarray._reconstruct),
    *((multiarray._reconstruct, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in KNOWN.get(module, ()) or (module == "torch" and is_dtype(name)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which isn't part of a checkpoint's metadata")


def is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


def guard() -> None:
    """Put these readers in the place of torch's, which megatron-core's loading goes through."""
    FileSystemReader.read_metadata = _read_metadata  # type: ignore[method-assign]
    default_planner.DefaultLoadPlanner.load_bytes = _load_bytes  # type: ignore[method-assign, assignment]


def _read_metadata(self: Any, *_: Any, **options: Any) -> Any:
    with self.fs.create_stream(self._get_metadata_path(options.get("rank")), "rb") as file:
        found = _Unpickler(file).load()
    if not isinstance(found, metadata.Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(found).__name__}, not a checkpoint's metadata")
    about = getattr(found, "storage_meta", None) or metadata.StorageMeta()
    about.load_id = self.load_id
    found.storage_meta = about
    return found


def _load_bytes(self: Any, item: Any, value: io.BytesIO) -> None:
    with torch.serialization.safe_globals(ARRAYS):
        loaded = torch.load(value, map_location="cpu", weights_only=True)
    name = item.dest_index.fqn
    if self.flatten_state_dict:
        default_planner.set_element(self.original_state_dict, self.mappings[name], loaded)
    else:
        self.state_dict[name] = loaded
