"""A folder in the hub's layout as a source of rows by Megatron's names."""

import copy
from pathlib import Path

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec.jobs import MixtralShape
from megatron_mixtral.weights import hub
from megatron_mixtral.weights.copying import Files
from megatron_mixtral.weights.mapping import Rows, links


class HubRows:
    """A hub folder read by Megatron's names; what is stored is checked against the shape at once."""

    def __init__(self, folder: Path, shape: MixtralShape) -> None:
        self.hub, names = hub.open_model(folder, shape)
        self._parts: dict[tuple[str, tuple[int, ...]], list[tuple[Rows, Rows]]] = {}
        for link in links(shape, names):
            self._parts.setdefault((link.megatron.name, link.megatron.index), []).append((link.megatron, link.hub))
        self._some = {name: parts[0][1].name for (name, _), parts in self._parts.items()}
        for (name, _), parts in self._parts.items():
            if other := [own.name for _, own in parts if self.hub.dtype(own.name) != self.dtype(name)]:
                raise InputError(f"{folder}: {other[0]} and {self._some[name]} differ in type; convert it first")

    def dtype(self, name: str) -> str:
        return self.hub.dtype(self._some[name])

    def row_bytes(self, name: str) -> int:
        return self.hub.row_bytes(self._some[name])

    def read(self, rows: Rows, out: memoryview) -> None:
        width = self.row_bytes(rows.name)
        for here, there in self._parts[rows.name, rows.index]:
            start, stop = max(rows.start, here.start), min(rows.stop, here.stop)
            if start < stop:
                shift = there.start - here.start
                part = Rows(there.name, there.index, start + shift, stop + shift)
                self.hub.read(part, out[(start - rows.start) * width : (stop - rows.start) * width])

    def file_of(self, rows: Rows) -> Path:
        parts = self._parts[rows.name, rows.index]
        return self.hub.file_of(next(there for here, there in parts if rows.start < here.stop))

    def fingerprint(self) -> dict[str, list[int]]:
        """Of every file read."""
        return self.hub.fingerprint()

    def apart(self) -> "HubRows":
        """For another thread: with files of its own."""
        mine = copy.copy(self)
        mine.hub = copy.copy(self.hub)
        mine.hub.files = Files()
        return mine
