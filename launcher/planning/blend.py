"""A run's training data: one prefix of prepared data, or several with weights, PREFIX:WEIGHT (pure)."""

from dataclasses import dataclass

from launcher.cluster import paths
from launcher.cluster.profile import ClusterProfile
from launcher.planning.refusals import as_typed
from megatron_mixtral.spec import checks


@dataclass(frozen=True, kw_only=True)
class Blend:
    """`prefixes` of whole paths, and what the job's configuration says of them."""

    prefixes: tuple[str, ...]
    written: str | list[str]


def read(profile: ClusterProfile, data: str | tuple[str, ...] | None) -> Blend:
    """From what was typed; `UsageError` for a weight that isn't one, or that only some have."""
    if data is None:
        data = paths.data_prefix(profile)
    if isinstance(data, str):
        prefix = paths.path(data, "--data")
        return Blend(prefixes=(prefix,), written=prefix)
    with as_typed():
        parts = [(paths.path(prefix, "--data"), weight) for prefix, weight in checks.blend(data)]
        prefixes = checks.distinct([prefix for prefix, _ in parts])
    return Blend(prefixes=prefixes, written=[p if w is None else f"{p}:{w!r}" for p, w in parts])
