"""A Slurm that answers with what a site's commands printed, as a host for the launcher."""

import re
from collections.abc import Callable
from pathlib import Path

from launcher.errors import Fault
from launcher.host.base import TIMEOUT

SITES = Path(__file__).parents[1] / "launcher" / "cluster" / "sites"
NAMES = sorted(path.name for path in SITES.iterdir() if path.is_dir())


class Recorded:
    """`damage` is what happens to every answer on its way."""

    def __init__(self, site: str, damage: Callable[[str], str] = str) -> None:
        self.folder, self.damage = SITES / site, damage
        self.calls: list[tuple[str, ...]] = []

    def call(self, program: str, *arguments: str, timeout: float = TIMEOUT) -> str:
        self.calls.append((program, *arguments))
        if program == "sbatch":
            return self._sbatch(" ".join(arguments))
        if program == "id":
            return "ada\n" if arguments == ("-un",) else "users ml\n"
        return self.damage(self._read(_file(program, arguments), program))

    def _sbatch(self, asked: str) -> str:
        accepts = self.folder / "accepts"
        if accepts.exists() and not re.search(accepts.read_text().strip(), asked):
            raise Fault(f"sbatch: {(self.folder / 'refusal').read_text().strip()}")
        return ""

    def _read(self, name: str, program: str) -> str:
        try:
            return (self.folder / name).read_text()
        except OSError:
            raise Fault(f"{program}: not recorded") from None


def _file(program: str, arguments: tuple[str, ...]) -> str:
    if program == "sacctmgr":
        return "assoc" if "associations" in arguments else "defacct"
    return arguments[-1] if program == "scontrol" else program
