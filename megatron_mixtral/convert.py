"""The job `convert`: weights between the hub's layout and Megatron's `torch_dist`, streamed, by one or many.

No model is built and no GPU needed; memory stays at a few buffers whatever the model's size. The output has its
name only when it is complete, and a run killed at any point goes on where it was.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

from megatron_mixtral import hub, legacy, tensors, torch_dist, weights_folder
from megatron_mixtral.config import ConvertConfig, MixtralShape
from megatron_mixtral.copying import ITEMSIZE, Copier, Run, Source, Target, Unit, digests, write_all
from megatron_mixtral.errors import InputError, JobError
from megatron_mixtral.events import EventLog
from megatron_mixtral.progress import Progress
from megatron_mixtral.weights import Link, Names, hub_shapes, links
from megatron_mixtral.weights_folder import MARKER
from megatron_mixtral.work import Crew, Published, Work, rough_name

UNIT_BYTES = 1 << 30  # what a process writes before it says that it's done, and writes again after a kill
SMALLEST_UNIT_BYTES = 1 << 20
RELEASE = "release"  # with the file that names it, what upstream Megatron loads


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One direction, planned: what to read, which files to write, and how to complete the folder."""

    shape: MixtralShape
    source_folder: Path
    source: Source
    units: list[Unit]
    subfolder: str  # of the output, where the units go
    framing: Callable[[Unit], Iterable[tuple[int, bytes]]]  # what to write around a unit's own bytes
    complete: Callable[[Path], None]  # write what is left to write in that folder, but for marker and assets
    kind: str
    identity: dict[str, Any]  # what makes it the same source later
    about: dict[str, Any] = field(default_factory=dict)  # what mixlaunch.json says of this kind alone

    @property
    def marker(self) -> Path:
        return Path(self.subfolder, MARKER)


def run(config: ConvertConfig, run_dir: Path) -> None:
    """Convert, as the one of `WORLD_SIZE` processes that `RANK` says."""
    crew = Crew.from_environment()
    conversion = plan(config)
    work = Work(Path(config.output).expanduser().absolute(), identity(config, conversion))
    if work.is_published(conversion.marker):
        print(f"{work.output}: done already", flush=True)
        return
    events = EventLog(run_dir / "events.jsonl" if crew.rank == 0 else None)
    try:
        write(config, conversion, work, crew, events)
    except Published:
        if not work.is_published(conversion.marker):
            raise JobError(f"{work.partial}: was removed while it was being written") from None


def write(config: ConvertConfig, conversion: Conversion, work: Work, crew: Crew, events: EventLog) -> None:
    """This process's units; then, in the first one, the rest of the folder and its name."""
    folder = work.partial / conversion.subfolder
    units = conversion.units
    work.begin(sum(u.nbytes for u in units), crew, folder)
    places = set(crew.mine([u.nbytes for u in units]))
    mine = [units[place] for place in sorted(places)]
    others = [unit for place, unit in enumerate(units) if place not in places]
    progress = Progress(
        sum(u.nbytes for u in mine),
        label=f"rank {crew.rank}",
        events=events,
        whole=sum(u.nbytes for u in units),
        elsewhere=lambda: sum(u.nbytes for u in others if work.is_recorded(u.file)) if crew.rank == 0 else 0,
    )
    write_units(config, conversion, work, mine, progress)
    if crew.rank > 0:
        progress.finish()
        return work.wait_published(conversion.marker)
    work.wait([unit.file for unit in units], progress.wait)
    progress.finish()
    complete(config, conversion, work, folder, events)
    print(f"{work.output}: complete", flush=True)
    return None


def write_units(
    config: ConvertConfig, conversion: Conversion, work: Work, units: list[Unit], progress: Progress
) -> None:
    """Write each unit that has no record yet; while one goes to the disk, the next is being copied."""
    folder = work.partial / conversion.subfolder
    copier = Copier(conversion.source, check_finite=config.check_finite, progress=progress.add)
    with ThreadPoolExecutor(1, thread_name_prefix="keep") as keeper:
        kept = None
        for unit in units:
            if work.record(unit.file) is not None:
                progress.skip(unit.nbytes)
                continue
            path = folder / unit.file
            descriptor = work.claim(path)
            written = copier.write(unit, descriptor)
            if kept:
                kept.result()
            kept = keeper.submit(keep, conversion, work, unit, path, descriptor, written, verify=config.verify)
        if kept:
            kept.result()
    copier.close()


def keep(
    conversion: Conversion,
    work: Work,
    unit: Unit,
    path: Path,
    descriptor: int,
    written: dict[str, str],
    *,
    verify: bool,
) -> None:
    """Frame a copied unit, have it on the disk, compare if asked to, and record it."""
    for place, data in conversion.framing(unit):
        write_all(descriptor, data, place)
    os.fsync(descriptor)
    if verify:
        found = digests(unit, rough_name(path))
        if wrong := sorted(name for name in written if found[name] != written[name]):
            raise JobError(f"{path}: tensor {wrong[0]} isn't on the disk as it was written; is the disk sound?")
    work.keep(unit.file, path, descriptor, {"digests": written})


def complete(config: ConvertConfig, conversion: Conversion, work: Work, folder: Path, events: EventLog) -> None:
    """Everything that isn't weights, the marker last, and the folder's name."""
    conversion.complete(folder)
    copy_assets(conversion.source_folder, folder, config.dtype)
    found: dict[str, str] = {}
    for unit in conversion.units:
        found |= (work.record(unit.file) or {})["digests"]
    types = sorted({t.dtype for unit in conversion.units for t in unit.targets}, key=lambda d: ITEMSIZE[d])
    marker = {
        "format": weights_folder.FORMAT,
        "kind": conversion.kind,
        "step": None,
        "dtype": types[0],
        "source": {"path": str(conversion.source_folder), "revision": hub.revision(conversion.source_folder)},
        "layout": asdict(config.layout),
        "shape": asdict(conversion.shape),
        **conversion.about,
        "conversion": work.plan,
        "digest": "blake3",
        "digests": dict(sorted(found.items())),
    }
    weights_folder.write_marker(folder, marker)
    if config.check_logits:
        events.write("note", text=check_logits(config, conversion, work, folder))
    if conversion.subfolder:
        weights_folder.replace_text(work.partial / weights_folder.LATEST, conversion.subfolder)
    work.publish()


def check_logits(config: ConvertConfig, conversion: Conversion, work: Work, folder: Path) -> str:
    """Compute with what was read and with what was written; the other processes are told that it takes a while."""
    from megatron_mixtral import logits  # imports torch

    hub_side, megatron_side = conversion.source_folder, folder
    if config.to == "hf":
        hub_side, megatron_side = folder, conversion.source_folder
    with work.alive():
        return logits.check(
            hub_side, megatron_side, dtype=config.dtype, prompt=config.prompt, tolerance=config.tolerance
        )


def identity(config: ConvertConfig, conversion: Conversion) -> dict[str, Any]:
    """All that decides the output's bytes."""
    asked = {"to": config.to, "dtype": config.dtype, "max_shard_gb": config.max_shard_gb, "format": config.format}
    if config.format == legacy.KIND:
        asked |= {"layout": asdict(config.layout), **conversion.about}
    return {**asked, "shape": asdict(conversion.shape), "files": conversion.identity}


def plan(config: ConvertConfig) -> Conversion:
    """Read the source's headers and lay out the output; `InputError` for whatever is wrong with the source."""
    if config.dtype is not None and config.dtype not in ITEMSIZE:
        raise InputError(f"dtype: {config.dtype!r} isn't one of {', '.join(ITEMSIZE)}")
    if config.format not in FORMATS:
        raise InputError(f"format: {config.format!r} isn't one of {', '.join(FORMATS)}")
    directions = {"megatron": plan_to_megatron, "hf": plan_to_hub}
    if config.max_shard_gb <= 0:
        raise InputError(f"max_shard_gb: {config.max_shard_gb} isn't a size")
    if config.to not in directions:
        raise InputError(f"to: {config.to!r} isn't one of {', '.join(directions)}")
    source = Path(config.source).expanduser().absolute()
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    return directions[config.to](config, source)


def plan_to_megatron(config: ConvertConfig, folder: Path) -> Conversion:
    shape = MixtralShape.from_folder(folder)
    config.layout.check(shape)
    source = hub.HubFolder(folder)
    names = Names.found_in(source.tensors)
    if shape.tie_word_embeddings:
        source.drop_copy("lm_head.weight", of="model.embed_tokens.weight")
    source.check(hub_shapes(shape, names))
    return FORMATS[config.format](config, shape, names, source)


def plan_torch_dist(config: ConvertConfig, shape: MixtralShape, names: Names, source: hub.HubFolder) -> Conversion:
    """The checkpoint that loads at every layout."""
    targets = list(megatron_targets(shape, names, source, config.dtype))
    total = sum(t.nbytes for t in targets)
    limit = max(SMALLEST_UNIT_BYTES, min(UNIT_BYTES, total // 32))
    units = torch_dist.files(targets, limit=limit)

    def finish(out: Path) -> None:
        objects, file = empty_objects(shape), f"__{len(units)}_0.distcp"
        torch_dist.write_metadata(out, units, tensors.shapes(shape), objects, file)
        torch_dist.write_common(out)

    return Conversion(
        shape=shape,
        source_folder=source.folder,
        source=source,
        units=units,
        subfolder=RELEASE,
        framing=torch_dist.frames,
        complete=finish,
        kind="weights",
        identity=source.fingerprint(),
    )


def plan_legacy(config: ConvertConfig, shape: MixtralShape, names: Names, source: hub.HubFolder) -> Conversion:
    """The checkpoint of one layout, for Megatron jobs older than `torch_dist`."""
    about = {"names": config.names, "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by}
    cut = legacy.Cut(shape=shape, layout=config.layout, **about)
    types = common_types(links(shape, names), source)
    return Conversion(
        shape=shape,
        source_folder=source.folder,
        source=source,
        units=legacy.files(cut, names, dict.fromkeys(types, config.dtype) if config.dtype else types),
        subfolder=RELEASE,
        framing=legacy.frames,
        complete=lambda out: None,
        kind=legacy.KIND,
        identity=source.fingerprint(),
        about={"legacy": about},
    )


FORMATS: dict[str, Callable[..., Conversion]] = {"torch_dist": plan_torch_dist, legacy.KIND: plan_legacy}


def megatron_targets(shape: MixtralShape, names: Names, source: Source, dtype: str | None) -> Iterator[Target]:
    """The chunks to write: a layer's or an expert's part of each tensor, gate and up apart as megatron-core does.

    Digests go by the hub's own names, whatever names the source has.
    """
    named = zip(links(shape, names), links(shape), strict=True)
    shapes, types = tensors.shapes(shape), {} if dtype else common_types(links(shape, names), source)

    def chunk(pair: tuple[Link, Link]) -> tuple[Any, ...]:
        rows = pair[0].megatron
        return rows.name, rows.index, rows.start if "linear_fc1" in rows.name else 0

    for (name, index, start), group in groupby(named, chunk):
        pairs = list(group)
        rest = shapes[name][len(index) + 1 :]
        yield Target(
            name=name,
            offsets=(*index, start, *(0 for _ in rest)),
            sizes=(*(1 for _ in index), sum(len(link.megatron) for link, _ in pairs), *rest),
            dtype=dtype or types[name],
            runs=tuple(Run(link.hub, own.hub.name) for link, own in pairs),
        )


def common_types(table: Iterable[Link], source: Source) -> dict[str, str]:
    """Megatron tensor -> the one type of all that goes into it."""
    types: dict[str, str] = {}
    first: dict[str, str] = {}
    for link in table:
        name, found = link.megatron.name, source.dtype(link.hub.name)
        if types.setdefault(name, found) != found:
            other = f"{first[name]} is {types[name]}, {link.hub.name} is {found}"
            raise InputError(f"{other}: both go into one tensor of Megatron's; give --dtype")
        first.setdefault(name, link.hub.name)
    return types


def empty_objects(shape: MixtralShape) -> Iterator[str]:
    """The objects, all None, that Transformer Engine's modules ask a checkpoint for."""
    for name, grid in tensors.extra_states(shape).items():
        for place in product(*map(range, grid)):
            yield f"{name}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, grid))}"


def plan_to_hub(config: ConvertConfig, folder: Path) -> Conversion:
    newest = weights_folder.resolve(folder)
    shape = MixtralShape.from_folder(newest)
    source = legacy.open_weights(newest, shape, weights_folder.read_marker(newest))
    units = hub.shards(hub_targets(shape, source, config.dtype), limit=int(config.max_shard_gb * 1e9))

    def finish(out: Path) -> None:
        if len(units) > 1:
            (out / hub.INDEX).write_text(hub.index(units))

    return Conversion(
        shape=shape,
        source_folder=newest,
        source=source,
        units=units,
        subfolder="",
        framing=lambda unit: [(0, hub.header(unit.targets))],
        complete=finish,
        kind="hub",
        identity=source.fingerprint(),
    )


def hub_targets(shape: MixtralShape, source: Source, dtype: str | None) -> Iterator[Target]:
    """Every tensor of the hub's layout, put together from its rows in Megatron's."""
    runs: dict[str, list[Run]] = {name: [] for name in hub_shapes(shape)}
    for link in links(shape):
        runs[link.hub.name].append(Run(link.megatron, link.hub.name))
    for name, sizes in hub_shapes(shape).items():
        stored = source.dtype(runs[name][0].rows.name)
        yield Target(name, (0,) * len(sizes), sizes, dtype or stored, tuple(runs[name]))


def copy_assets(source: Path, out: Path, dtype: str | None) -> None:
    """`config.json` and the tokenizer's files as they are, but for the type that was asked for."""
    for path in weights_folder.hub_assets(source):
        if path.name == "config.json" and dtype:
            config = json.loads(path.read_text())
            key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 renamed it
            (out / path.name).write_text(json.dumps(config | {key: dtype}, indent=2) + "\n")
        else:
            (out / path.name).write_bytes(path.read_bytes())
