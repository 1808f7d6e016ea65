"""The sandbox's record in its folder: its shape, its processes, and their mark.

It is written before the first process starts, so a crash at any point can be cleaned up.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from launcher.common import files
from launcher.errors import Fault
from launcher.host.local import Local
from launcher.sandbox.config import ClusterShape

STATE = "sandbox.json"
MARK = "MIXLAUNCH_SANDBOX_ID"  # in the environment of every process that is a sandbox's


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """One sandbox as its folder describes it; `host` runs the commands of its Slurm."""

    folder: Path
    sockets: Path
    mark: str
    shape: ClusterShape
    processes: dict[str, int]
    accounting: bool
    ready: bool = False

    @property
    def slurm_conf(self) -> Path:
        return self.folder / "slurm.conf"

    @property
    def host(self) -> Local:
        return Local(str(self.slurm_conf))


def write(sandbox: Sandbox) -> None:
    """Record `sandbox` in its folder, whole or not at all."""
    record = {
        **dataclasses.asdict(sandbox),
        "folder": str(sandbox.folder),
        "sockets": str(sandbox.sockets),
        "schema": 1,
    }
    files.write_json(sandbox.folder / STATE, record)


def read(folder: Path) -> Sandbox | None:
    """The sandbox that `folder` holds, up or not; None if it holds none."""
    try:
        record = json.loads((folder / STATE).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, json.JSONDecodeError) as error:
        raise Fault(f"{folder / STATE}: {error}") from error
    shape = record["shape"]
    shape |= {name: tuple(shape[name]) for name in ("features", "accounts", "qos")}
    shape["partitions"] = tuple((name, tier) for name, tier in shape["partitions"])
    names = {field.name for field in dataclasses.fields(Sandbox)} - {"folder", "sockets", "shape"}
    sockets = Path(record["sockets"])
    return Sandbox(
        folder=folder, sockets=sockets, shape=ClusterShape(**shape), **{name: record[name] for name in names}
    )
