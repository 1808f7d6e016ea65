"""What a run trains on: one prefix of prepared data, or several and how much of each, PREFIX:WEIGHT (pure)."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.cluster import paths
from launcher.common import quoting
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.cluster.profile import ClusterProfile


@dataclass(frozen=True, kw_only=True)
class Blend:
    """`prefixes` of whole paths, and what the job's configuration says of them."""

    prefixes: tuple[str, ...]
    written: str | list[str]


def read(profile: "ClusterProfile", data: str | tuple[str, ...] | None) -> Blend:
    """From what was typed; `UsageError` for a weight that isn't one, or that only some have."""
    if data is None:
        data = paths.data_prefix(profile)
    if isinstance(data, str):
        prefix = paths.path(data, "--data")
        return Blend(prefixes=(prefix,), written=prefix)
    parts = [_part(entry) for entry in data]
    prefixes = tuple(paths.path(prefix, "--data") for prefix, _ in parts)
    if len({bool(weight) for _, weight in parts}) > 1:
        raise UsageError(f"--data: {', '.join(data)}: give every part a weight, as PREFIX:WEIGHT, or none")
    if twice := next((p for p in prefixes if prefixes.count(p) > 1), None):
        raise UsageError(f"--data: {twice} is there twice")
    return Blend(prefixes=prefixes, written=[f"{p}{w}" for p, (_, w) in zip(prefixes, parts, strict=True)])


def _part(entry: str) -> tuple[str, str]:
    """Prefix, and its weight with the colon before it."""
    prefix, colon, weight = entry.rpartition(":")
    try:
        number = float(weight) if colon and prefix else None
    except ValueError:
        number = None
    if number is None:
        return entry, ""
    if not (number > 0 and math.isfinite(number)):
        raise UsageError(f"--data: {quoting.shown(entry)}: a weight is a number above 0")
    return prefix, f":{number!r}"
