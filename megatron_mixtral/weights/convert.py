"""Converts weights between the hub's layout and Megatron's `torch_dist`, as a stream, with one process or many.

It builds no model and needs no GPU. Its memory is a few buffers for any size of model. The output gets its name
when it is complete, and a killed conversion continues where it stopped.
"""

import json
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral import signals
from megatron_mixtral.errors import CheckpointError, JobError, Requeue
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.observability.progress import CopyProgress
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import hub, legacy
from megatron_mixtral.weights import merged as merging
from megatron_mixtral.weights.copying import Copier, Unit, around, digests, write_all
from megatron_mixtral.weights.plan import Conversion, plan
from megatron_mixtral.weights.shared_work import Published, Work, Workers, rough_name
from megatron_mixtral.weights.tensors import ITEMSIZE


def convert(config: ConvertConfig, run_dir: Path, *, compare: Callable[..., str] | None = None) -> None:
    """Convert as process `RANK` of `WORLD_SIZE`.

    `compare` computes the logits of both folders for `config.check_logits`. The caller passes it, because it needs
    torch and this module doesn't.
    """
    workers, conversion = Workers.from_environment(), plan(config)
    checks = [name for name in ("verify", "check_finite") if getattr(config, name)]
    work = Work(Path(config.output).expanduser().absolute(), identity(config, conversion), checks)
    there = work.is_published(conversion.marker)
    task = Task(
        config=config,
        conversion=conversion,
        work=work,
        workers=workers,
        events=EventLog(run_dir / rundir.EVENTS if workers.rank == 0 and not there else None),
        leaving=Leaving(work.records, run_dir.name),
        compare=compare,
    )
    if there:
        print(f"{work.output}: done already", flush=True)
        return task.check_again()
    try:
        return task.write()
    except OSError as error:
        raise JobError(f"{error.filename or work.output}: {error.strerror or error}") from error
    except Published:
        if not work.is_published(conversion.marker):
            raise JobError(f"{work.partial}: was removed while it was being written") from None


class Leaving:
    """Whether this attempt was asked to stop. A file tells processes that were still starting at the signal."""

    def __init__(self, folder: Path, run: str) -> None:
        self._note = folder / f"left-{run}-{os.environ.get('MIXLAUNCH_ATTEMPT', 0)}"

    def if_asked(self) -> None:
        """Raise `Requeue` then; finished files stay finished."""
        if signals.requested() or self._note.exists():
            with suppress(FileNotFoundError):
                self._note.touch()
            raise Requeue("asked to stop; the next attempt continues with the missing files")


@dataclass(frozen=True, kw_only=True)
class Task:
    """One process's part of a conversion."""

    config: ConvertConfig
    conversion: Conversion
    work: Work
    workers: Workers
    events: EventLog
    leaving: Leaving
    compare: Callable[..., str] | None

    def check_again(self) -> None:
        """Run the requested checks on an existing output, which may be older than these options."""
        config, conversion = self.config, self.conversion
        folder, units = self.work.output / conversion.subfolder, conversion.units
        recorded = weights_folder.read_marker(folder)["digests"]
        copier, nowhere = Copier(conversion.source, check_finite=True), os.open(os.devnull, os.O_WRONLY)
        for unit in (units[place] for place in self.workers.mine([u.nbytes for u in units])):
            if config.check_finite:
                copier.write(unit, nowhere)
            found = digests(unit, folder / unit.file) if config.verify else {}
            if wrong := sorted(name for name in found if found[name] != recorded[name]):
                raise CheckpointError(f"{folder / unit.file}: tensor {wrong[0]}: not what was converted")
        copier.close()
        os.close(nowhere)
        if config.check_logits and self.workers.rank == 0:
            self._compare_logits(folder)

    def write(self) -> None:
        """Write this process's units; the first process then completes the folder and gives it its name."""
        work, workers, units = self.work, self.workers, self.conversion.units
        folder = work.partial / self.conversion.subfolder
        work.begin(sum(u.nbytes for u in units), workers, folder)
        places = set(workers.mine([u.nbytes for u in units]))
        mine = [units[place] for place in sorted(places)]
        others = [unit for place, unit in enumerate(units) if place not in places]
        progress = CopyProgress(
            sum(u.nbytes for u in mine),
            label=f"rank {workers.rank}",
            events=self.events,
            whole=sum(u.nbytes for u in units),
            elsewhere=lambda: sum(u.nbytes for u in others if work.is_recorded(u.file)) if workers.rank == 0 else 0,
        )
        self._write_units(mine, folder, progress)
        if workers.rank > 0:
            progress.finish()
            return work.wait_published(self.conversion.marker, self.leaving.if_asked)

        def meanwhile() -> None:
            self.leaving.if_asked()
            progress.wait()

        work.wait([unit.file for unit in units], meanwhile)
        progress.finish()
        self._complete(folder)
        print(f"{work.output}: complete", flush=True)
        return None

    def _write_units(self, units: list[Unit], folder: Path, progress: CopyProgress) -> None:
        """Write each unit without a record; the next one is copied while the last one goes to the disk."""
        copier = Copier(self.conversion.source, check_finite=self.config.check_finite, progress=progress.add)
        with ThreadPoolExecutor(1, thread_name_prefix="keep") as keeper:
            kept = None
            for unit in units:
                self.leaving.if_asked()
                if self.work.record(unit.file) is not None:
                    progress.skip(unit.nbytes)
                    continue
                path = folder / unit.file
                descriptor = self.work.claim(path)
                try:
                    written = copier.write(unit, descriptor)
                except BaseException:
                    os.close(descriptor)  # this also releases the lock
                    raise
                if kept:
                    kept.result()
                kept = keeper.submit(self._keep, unit, path, descriptor, written)
            if kept:
                kept.result()
        copier.close()

    def _keep(self, unit: Unit, path: Path, descriptor: int, written: dict[str, str]) -> None:
        """Finish a copied unit: write its frame, sync it, compare it with known digests, and record it."""
        refuse_changed(self.conversion, unit, written)
        for place, data in self.conversion.framing(unit):
            write_all(descriptor, data, place)
        if self.config.verify:
            os.fsync(descriptor)
            found = digests(unit, rough_name(path))
            if wrong := sorted(name for name in written if found[name] != written[name]):
                raise JobError(
                    f"{path}: tensor {wrong[0]} on the disk differs from what was written; the disk may be faulty"
                )
        spans = [(place, target.nbytes) for place, target in zip(unit.places, unit.targets, strict=True)]
        self.work.keep(unit.file, path, descriptor, {"digests": written, "around": around(rough_name(path), spans)})

    def _complete(self, folder: Path) -> None:
        """Write everything except weights, the marker last, and give the folder its name."""
        conversion = self.conversion
        conversion.complete(folder)
        copy_assets(conversion.source_folder, folder, self.config.dtype, without=conversion.without)
        weights_folder.write_marker(folder, self._marker(folder))
        if self.config.check_logits:
            self.events.write("note", text=self._compare_logits(folder))
        if conversion.subfolder:
            weights_folder.replace_text(self.work.partial / rundir.LATEST, conversion.subfolder)
        self.work.publish()

    def _marker(self, folder: Path) -> dict[str, Any]:
        """The contents of `mixlaunch.json` for a folder that is otherwise complete."""
        conversion, units = self.conversion, self.conversion.units
        records = {unit.file: self.work.record(unit.file) or {} for unit in units}
        found = {name: digest for record in records.values() for name, digest in record["digests"].items()}
        types = sorted({t.dtype for unit in units for t in unit.targets}, key=lambda d: ITEMSIZE[d])
        return {
            "format": weights_folder.FORMAT,
            "kind": conversion.kind,
            "step": None,
            "dtype": types[0],
            "source": {"path": str(conversion.source_folder), "revision": hub.revision(conversion.source_folder)},
            "layout": asdict(self.config.layout),
            "shape": asdict(conversion.shape),
            **conversion.about,
            "conversion": self.work.plan,
            "digest": "blake3",
            "digests": dict(sorted(found.items())),
            "around": {file: record["around"] for file, record in records.items()},
            "others": {p.name: around(p) for p in sorted(folder.iterdir()) if is_other(p, records)},
        }

    def _compare_logits(self, folder: Path) -> str:
        """Compare the logits of source and output, while the other processes wait."""
        assert self.compare is not None, "whoever asks for the comparison hands it in"
        config, conversion = self.config, self.conversion
        hub_side, megatron_side = conversion.source_folder, folder
        if config.to == "hf":
            hub_side, megatron_side = folder, conversion.source_folder
        merged = isinstance(conversion.source, merging.Merged)
        with self.work.alive():
            return self.compare(
                hub_side,
                megatron_side,
                dtype=config.dtype or (conversion.units[0].targets[0].dtype if merged else None),
                prompt=config.prompt,
                tolerance=config.tolerance,
                base=config.base,
            )


def refuse_changed(conversion: Conversion, unit: Unit, written: dict[str, str]) -> None:
    """`CheckpointError` for a tensor that has changed since a conversion wrote the source."""
    for run in (run for target in unit.targets for run in target.runs):
        if conversion.recorded.get(run.digest, written[run.digest]) != written[run.digest]:
            file = conversion.source.file_of(run.rows)
            raise CheckpointError(f"{file}: tensor {run.digest}: damaged: it differs from what was written here")


def is_other(path: Path, units: Collection[str]) -> bool:
    """Whether `path` is a file of the finished folder other than weights and the marker."""
    return path.is_file() and path.name not in (*units, rundir.MARKER) and path.suffix != ".rough"


def identity(config: ConvertConfig, conversion: Conversion) -> dict[str, Any]:
    """All that decides the output's bytes."""
    asked: dict[str, Any] = {name: getattr(config, name) for name in ("to", "dtype", "max_shard_gb", "format")}
    if config.format == legacy.KIND:
        asked |= {"layout": asdict(config.layout), **conversion.about}
    return {**asked, "shape": asdict(conversion.shape), "files": conversion.identity}


def copy_assets(source: Path, out: Path, dtype: str | None, *, without: tuple[str, ...] = ()) -> None:
    """Copy `config.json` and the tokenizer's files, with the requested data type."""
    for path in weights_folder.hub_assets(source):
        if path.name in without:
            continue
        if path.name == "config.json" and dtype:
            config = json.loads(path.read_text())
            key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 renamed it
            (out / path.name).write_text(json.dumps(config | {key: dtype}, indent=2) + "\n")
        else:
            (out / path.name).write_bytes(path.read_bytes())
