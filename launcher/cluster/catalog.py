"""Finds profiles: the folders that are searched, the names in them, and the file of a name or a path.

It reads no profile, so completing a name costs only listing a few folders.
"""

import os
from importlib import resources
from pathlib import Path

from launcher.common import quoting, words
from launcher.errors import ProfileError

DEFAULT = "local"
SUFFIXES = (".yaml", ".yml")


def own_folder() -> Path:
    """Where a user's own profiles lie unless $MIXLAUNCH_CLUSTERS names other folders."""
    return Path(os.path.expanduser(os.environ.get("XDG_CONFIG_HOME") or "~/.config"), "mixlaunch", "clusters")


def search_path() -> list[Path]:
    """Folders that profiles are looked for in, first match first; the built-in ones come last."""
    named = [Path(os.path.expanduser(p)) for p in os.environ.get("MIXLAUNCH_CLUSTERS", "").split(os.pathsep) if p]
    return [*named, own_folder(), Path(str(resources.files("launcher.clusters")))]


def available() -> dict[str, Path]:
    """Every profile's name and file; an earlier folder of the search path hides a later one's."""
    found: dict[str, Path] = {}
    for path in _every():
        found.setdefault(path.stem, path)
    return found


def _every() -> list[Path]:
    return [path for folder in search_path() for path in sorted(folder.glob("*.yaml"))]


def find(cluster: str) -> Path:
    """The file of a cluster's name, or of a path that ends in .yaml; `ProfileError` lists what there is."""
    if cluster.endswith(SUFFIXES):
        path = Path(os.path.expanduser(cluster))
        if not path.is_file():
            raise ProfileError(f"cluster profile {cluster}: no such file")
        return path
    found = available()
    if cluster not in found:
        raise ProfileError(f"unknown cluster {quoting.shown(cluster)}; {words.choices(cluster, sorted(found))}")
    return found[cluster]


def parent(reference: str, child: Path) -> Path:
    """The file that `extends: reference` in `child` means: a path beside it, or the next profile of that name."""
    if reference.endswith(SUFFIXES):
        path = child.parent / os.path.expanduser(reference)
        if not path.is_file():
            raise ProfileError(f"{path} doesn't exist")
        return path
    # `extends: selene` in your own selene.yaml means the profile that it hides.
    found = {path.stem: path for path in reversed(_every()) if path.resolve() != child.resolve()}
    if reference not in found:
        raise ProfileError(f"unknown cluster {quoting.shown(reference)}; {words.choices(reference, sorted(found))}")
    return found[reference]


def default() -> str:
    """The cluster that is meant when none is named."""
    return os.environ.get("MIXLAUNCH_CLUSTER") or DEFAULT
