"""Weights folders as files: finds the newest complete one, marks one complete, and removes old ones. It imports no
torch.

A folder is complete when it has `mixlaunch.json`, which is written last, by rename. Readers ignore a folder without
it.
"""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.spec.rundir import CHECKPOINTS, MARKER

FORMAT = 1


def step_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under a run's `checkpoints`."""
    return root / f"iter_{step:07d}"


def complete(root: Path) -> list[Path]:
    """The complete checkpoints directly under `root`, oldest first; `release` (weights) before any step."""
    found = [p for p in root.glob("iter_*") if re.fullmatch(r"iter_\d+", p.name)] + [root / "release"]
    return sorted((p for p in found if (p / MARKER).is_file()), key=_age)


def _age(folder: Path) -> int:
    return -1 if folder.name == "release" else int(folder.name.removeprefix("iter_"))


def newest(root: Path) -> Path | None:
    """The newest complete training checkpoint of a run's `checkpoints`, if there is one."""
    return next((p for p in reversed(complete(root)) if p.name != "release"), None)


def resolve(path: Path) -> Path:
    """The newest complete weights folder that `path` means.

    `path` is that folder itself, a converted model, a run, or its `checkpoints`. `CheckpointError` says what is
    there instead, and names unfinished saves.
    """
    if (path / MARKER).is_file():
        return path
    for root in (path / CHECKPOINTS, path):
        if found := complete(root):
            return found[-1]
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder")
    begun = sorted(p.name for p in [*path.glob("iter_*"), *path.glob("checkpoints/iter_*"), *path.glob("release")])
    if (path / ".metadata").exists():
        raise CheckpointError(f"{path}: incomplete, it has no {MARKER}")
    unfinished = f"; unfinished: {', '.join(begun)}" if begun else ""
    raise CheckpointError(
        f"{path}: no complete checkpoint here; expected {MARKER}, or release/ or iter_*/ with one{unfinished}"
    )


def find(path: Path) -> Path:
    """Like `resolve`, but it also finds a model in the hub's layout."""
    hub_like = (path / "config.json").is_file() and not (path / ".metadata").exists()
    return path if hub_like and is_hub(path) else resolve(path)


def is_hub(folder: Path) -> bool:
    """Whether a folder is in the hub's layout by its marker, or could be; weights aren't checked."""
    if (folder / MARKER).is_file():
        return bool(read_marker(folder).get("kind") == "hub")
    return not complete(folder) and not complete(folder / CHECKPOINTS)


def read_marker(folder: Path) -> dict[str, Any]:
    """The parsed `mixlaunch.json`; `CheckpointError` when absent, damaged or of a newer format."""
    path = folder / MARKER
    try:
        marker: dict[str, Any] = json.loads(path.read_text())
        version = marker["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error!r}") from error
    if version != FORMAT:
        raise CheckpointError(f"{path}: format {version}; this version reads {FORMAT}")
    return marker


def hub_assets(folder: Path) -> list[Path]:
    """The files that go with weights: they describe the model and its tokenizer."""
    patterns = ["config.json", "generation_config.json", "tokenizer*", "chat_template*"]
    patterns += ["special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
    return sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())


def write_marker(folder: Path, marker: dict[str, Any]) -> None:
    """Declare `folder` complete: everything else in it reaches the disk before the marker has its name."""
    for path in folder.iterdir():
        _sync(path)
    replace_text(folder / MARKER, json.dumps(marker, indent=2) + "\n")
    _sync(folder)


def replace_text(path: Path, text: str) -> None:
    """Write `path` so a reader finds the old text or the new one, and never a part."""
    rough = path.with_name(f".{path.name}.{os.getpid()}.rough")
    rough.write_text(text)
    _sync(rough)
    rough.replace(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(root: Path, keep: int) -> list[Path]:
    """Remove all but the newest `keep` (at least two) complete training checkpoints; returns the removed ones.

    Remains of killed saves go too: folders without a marker that are older than the newest complete one.
    """
    whole = [p for p in complete(root) if p.name != "release"]
    old = whole[: -max(keep, 2)]
    for folder in old:
        (folder / MARKER).unlink()  # gone for every reader before its files are
        shutil.rmtree(folder)
    left = [p for p in root.glob("iter_*") if re.fullmatch(r"iter_\d+", p.name) and not (p / MARKER).exists()]
    left = [p for p in left if whole and _age(p) < _age(whole[-1])] + list(root.glob(".iter_*.unfinished-*"))
    for folder in left:
        shutil.rmtree(folder, ignore_errors=True)
    return old + left
