"""The cluster's list of bad nodes, with reasons and expiry dates, in the cluster's runs folder.

Everybody who shares the folder shares the nodes. The file is replaced as a whole, without expired entries.
"""

import contextlib
import datetime
import getpass
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.cluster.profile import ClusterProfile
from launcher.common import files, schema, shared_files
from launcher.errors import Fault, UsageError

FILE = "bad_nodes.json"
SCHEMA = 1
LOOKS = 3  # at a list that may be in the middle of being written
PAUSE = 0.05
ENTRY = {
    "node": schema.matching(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,252}"),
    "reason": schema.text,
    "by": schema.text,
    "since": schema.text,
    "until": schema.maybe(schema.moment),
}
UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True, kw_only=True)
class BadNode:
    """One entry; `until` is ISO text with a time zone, or None for no end."""

    node: str
    reason: str
    by: str
    since: str
    until: str | None

    def expired(self, now: datetime.datetime) -> bool:
        return self.until is not None and datetime.datetime.fromisoformat(self.until).astimezone() <= now


def path(profile: ClusterProfile) -> Path:
    """Where a cluster's list lies; behind a login node this is its copy's place."""
    return profile.host.place(Path(profile.paths.runs) / FILE)


def read(profile: ClusterProfile) -> list[BadNode]:
    """The entries that are valid now; `Fault` for a list that can't be read, so it doesn't pass as empty."""
    if profile.is_local:
        return []
    file = path(profile)
    now = datetime.datetime.now().astimezone()
    try:
        return [entry for entry in _entries(profile, file) if not entry.expired(now)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise Fault(f"{file}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError) as error:
        raise Fault(f"{file}: not a list of nodes ({error}); correct or remove it") from error


def _entries(profile: ClusterProfile, file: Path) -> list[BadNode]:
    for look in range(LOOKS):
        try:
            record: Any = shared_files.parsed(profile.host.read(file))
            break
        except ValueError:  # in a folder with the sticky bit it is written in place
            if look == LOOKS - 1:
                raise
            time.sleep(PAUSE)
    for entry in record["nodes"]:
        if wrong := schema.misfit(entry, ENTRY):
            raise ValueError(f"an entry: {wrong}")
    return [BadNode(**{name: entry[name] for name in ENTRY}) for entry in record["nodes"]]


def known(profile: ClusterProfile) -> list[BadNode]:
    """The same without a network, which planning doesn't need: nothing of a list on a login node."""
    return read(profile) if all(profile.host.known([str(path(profile))])) else []


def require_file_system(profile: ClusterProfile) -> None:
    """`UsageError` if the list would be on this machine's own disk, where nobody else sees it."""
    mount = Path(*Path(profile.paths.runs).parts[:2])
    if profile.host.known([str(mount)]) == [False]:
        raise UsageError(f"{mount} isn't on this machine; run this on a login node of {profile.name}")


def add(profile: ClusterProfile, reasons: Mapping[str, str], lasting: datetime.timedelta | None) -> list[BadNode]:
    """Put nodes on the list, or their entries anew; returns them."""
    now = datetime.datetime.now().astimezone()
    until = (now + lasting).isoformat(timespec="seconds") if lasting else None
    since = now.isoformat(timespec="seconds")
    new = [
        BadNode(node=node, reason=reason, by=getpass.getuser(), since=since, until=until)
        for node, reason in reasons.items()
    ]
    with _changing(profile) as entries:
        entries |= {entry.node: entry for entry in new}
    return new


def remove(profile: ClusterProfile, nodes: Iterable[str]) -> list[str]:
    """Take nodes off the list; returns those that were on it."""
    with _changing(profile) as entries:
        return [node for node in nodes if entries.pop(node, None)]


def duration(text: str) -> datetime.timedelta | None:
    """`12h`, `7d`, `2w`; None for `forever`; `UsageError` otherwise."""
    if text == "forever":
        return None
    match = re.fullmatch(r"(\d{1,4})([mhdw])", text)
    if match is None or not int(match[1]):
        raise UsageError(f"--for: {text!r} isn't a duration, such as 12h, 7d, 2w or forever")
    return datetime.timedelta(**{UNITS[match[2]]: int(match[1])})


@contextlib.contextmanager
def _changing(profile: ClusterProfile) -> Iterator[dict[str, BadNode]]:
    """The list under a lock, to be changed in place and then written."""
    file = path(profile)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with files.locked_shared(file.parent / f".{FILE}.lock"):  # without locks the last writer wins
            entries = {entry.node: entry for entry in read(profile)}
            yield entries
            nodes = [asdict(entry) for _, entry in sorted(entries.items())]
            files.write_shared(file, {"schema": SCHEMA, "nodes": nodes})
            profile.host.put(file)
    except OSError as error:
        raise Fault(f"{file}: {error.strerror}") from error
