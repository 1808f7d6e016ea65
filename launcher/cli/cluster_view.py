"""Cluster profiles for people and for programs: the table of them, and one as it is understood.

Both come in JSON as well, where nothing is shortened.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from launcher.cluster import catalog, profile
from launcher.cluster.profile import ClusterProfile
from launcher.common import terminal
from launcher.errors import MixlaunchError

if TYPE_CHECKING:
    from launcher.diagnose.profile_check import Finding

WORDS = {"ok": ("", "ok"), "failed": ("red", "failed"), "unknown": ("yellow", "can't tell")}
COLUMNS = ("CLUSTER", "SCHEDULER", "GPUS A NODE", "CONTAINER", "DESCRIPTION")


def every() -> Iterator[tuple[str, Path, ClusterProfile | MixlaunchError]]:
    """Name, file and profile of each that --cluster can name; a broken one's mistake in its place."""
    for name, path in sorted(catalog.available().items()):
        try:
            yield name, path, profile.read(path)
        except MixlaunchError as error:
            yield name, path, error


def table() -> None:
    """One line a profile; a broken one says what is wrong with it."""
    rows = []
    for name, _, cluster in every():
        if isinstance(cluster, MixlaunchError):
            rows.append((name, "", "", "", str(cluster).splitlines()[0]))
            continue
        node = cluster.node
        memory = f" x {node.gpu_memory_gb:g} GB" if node.gpu_memory_gb else ""
        gpus = f"{node.gpus}{memory}" if node.gpus else ""
        default = "*" if name == catalog.default() else ""
        rows.append((name + default, cluster.scheduler, gpus, cluster.container.runtime, cluster.description))
    terminal.table(COLUMNS, rows)


def listed() -> list[dict[str, Any]]:
    """The same for programs: a profile or an error each."""
    found = []
    for name, path, cluster in every():
        entry = {"name": name, "file": str(path), "default": name == catalog.default()}
        if isinstance(cluster, MixlaunchError):
            found.append(entry | {"error": str(cluster)})
        else:
            found.append(entry | {"profile": dumped(cluster)})
    return found


def text(cluster: ClusterProfile) -> str:
    """A profile as YAML that reads back as the same."""
    return yaml.safe_dump(dumped(cluster), sort_keys=False, allow_unicode=True)


def dumped(cluster: ClusterProfile) -> dict[str, Any]:
    """What a profile holds, defaults filled in; what has no value is left out."""
    return cluster.model_dump(mode="json", exclude_none=True)


def finding(found: "Finding") -> None:
    """One line a question."""
    style, word = WORDS[found.verdict]
    terminal.say(f"{word:<11}{found.what}: {found.why}", style)


def read(name: str | None, overrides: Sequence[str] = ()) -> tuple[Path, ClusterProfile]:
    """The file and the profile that a command about one cluster means."""
    path = catalog.find(name or catalog.default())
    return path, profile.read(path, overrides)
