"""Plans a conversion: what to read, which files to write with which rows, and how to complete the folder.

Planning reads only headers. An error in the source is found here, before a byte is written.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, product
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.spec.rundir import MARKER
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import hub, legacy, merged, peft, tensors, torch_dist
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights.copying import RowRun, Source, Target, Unit
from megatron_mixtral.weights.tensors import Names, RowLink, hub_shapes, links

UNIT_BYTES = 1 << 30  # size of a unit, which a process writes as a whole, and again after a kill
SMALLEST_UNIT_BYTES = 1 << 20
RELEASE = "release"  # with the file that names it, what upstream Megatron loads


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """One direction, planned: what to read, which files to write, and how to complete the folder."""

    shape: MixtralShape
    source_folder: Path
    source: Source
    units: list[Unit]
    subfolder: str  # folder within the output that holds the units
    framing: Callable[[Unit], Iterable[tuple[int, bytes]]]  # bytes to write around a unit's tensors
    complete: Callable[[Path], None]  # write the other files of the folder, except marker and assets
    kind: str
    identity: dict[str, Any]  # identifies the source
    about: dict[str, Any] = field(default_factory=dict)  # entries of mixlaunch.json for this kind
    recorded: dict[str, str] = field(default_factory=dict)  # tensor -> digest from when the source was written
    without: tuple[str, ...] = ()  # files beside the source's weights that aren't copied

    @property
    def marker(self) -> Path:
        return Path(self.subfolder, MARKER)


def plan(config: ConvertConfig) -> Conversion:
    """Read the source's headers and lay out the output; `InputError` for an error in the source."""
    checks.check(config)
    directions = {"megatron": plan_to_megatron, "hf": plan_to_hub, "peft": plan_to_peft}
    source = Path(config.source).expanduser().absolute()
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    return directions[config.to](config, source)


def plan_to_megatron(config: ConvertConfig, folder: Path) -> Conversion:
    if not weights_folder.is_hub(folder):
        raise InputError(f"{folder}: in Megatron's layout already; --to hf converts it back")
    shape = MixtralShape.from_folder(folder)
    config.layout.check(shape)
    source, names = hub.open_model(folder, shape)
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
        recorded=recorded(source, config.dtype),
    )


def recorded(source: Any, dtype: str | None) -> dict[str, str]:
    """The tensors' digests in a folder that we made, if the copy should have the same."""
    plain = type(source) in (hub.HubFolder, torch_dist.TorchDistFolder)
    if dtype or not plain or not (source.folder / MARKER).is_file():
        return {}
    return weights_folder.read_marker(source.folder).get("digests") or {}


def plan_legacy(config: ConvertConfig, shape: MixtralShape, names: Names, source: hub.HubFolder) -> Conversion:
    """The checkpoint of one layout, for Megatron jobs older than `torch_dist`."""
    about: dict[str, Any] = {
        "names": config.names,
        "make_vocab_size_divisible_by": config.make_vocab_size_divisible_by,
    }
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
    """The chunks to write: a layer's or an expert's part of each tensor, with gate and up apart as in
    megatron-core.

    Digests have the hub's own names, even if the source has others.
    """
    named = zip(links(shape, names), links(shape), strict=True)
    shapes, types = tensors.shapes(shape), {} if dtype else common_types(links(shape, names), source)

    def chunk(pair: tuple[RowLink, RowLink]) -> tuple[Any, ...]:
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
            runs=tuple(RowRun(link.hub, own.hub.name) for link, own in pairs),
        )


def common_types(table: Iterable[RowLink], source: Source) -> dict[str, str]:
    """Megatron tensor -> the common type of all its rows."""
    types: dict[str, str] = {}
    first: dict[str, str] = {}
    for link in table:
        name, found = link.megatron.name, source.dtype(link.hub.name)
        if types.setdefault(name, found) != found:
            other = f"{first[name]} is {types[name]}, {link.hub.name} is {found}"
            raise InputError(f"{other}: both belong to one Megatron tensor; give --dtype")
        first.setdefault(name, link.hub.name)
    return types


def empty_objects(shape: MixtralShape) -> Iterator[str]:
    """The objects, all None, that Transformer Engine's modules ask a checkpoint for."""
    for name, grid in tensors.extra_states(shape).items():
        for place in product(*map(range, grid)):
            yield f"{name}/shard_{'.'.join(map(str, place))}_{'.'.join(map(str, grid))}"


def plan_to_hub(config: ConvertConfig, folder: Path) -> Conversion:
    if weights_folder.is_hub(folder) and any(folder.glob("*.safetensors")):
        raise InputError(f"{folder}: in the hub's layout already")
    newest = weights_folder.resolve(folder)
    shape = MixtralShape.from_folder(newest)
    source = merged.open_weights(newest, shape, base=config.base)
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
        framing=hub.frames,
        complete=finish,
        kind="hub",
        identity=source.fingerprint(),
        recorded=recorded(source, config.dtype),
    )


def plan_to_peft(config: ConvertConfig, folder: Path) -> Conversion:
    if config.check_logits:
        raise InputError("check_logits: adapters have no logits by themselves; use --to hf, which merges them")
    newest = weights_folder.resolve(folder)
    marker, shape = weights_folder.read_marker(newest), MixtralShape.from_folder(newest)
    if marker.get("kind") != adapters.KIND:
        raise InputError(
            f"{newest}: holds {marker.get('kind')}, not adapters; --to peft needs a run of finetune --lora"
        )
    lora = adapters.described(marker, newest)
    stored = merged.Adapters(newest, shape, lora).source
    source = peft.PeftRows(stored, shape.num_local_experts)
    base = config.base or marker["base"]["hub"] or marker["base"]["path"]
    return Conversion(
        shape=shape,
        source_folder=newest,
        source=source,
        units=[hub.file(peft.WEIGHTS, list(peft.targets(shape, lora, source, config.dtype)))],
        subfolder="",
        framing=hub.frames,
        complete=lambda out: peft.write_config(out, lora, base),
        kind="peft",
        identity={**stored.fingerprint(), "base": base},
        without=("config.json", "generation_config.json"),  # files of a whole model
    )


def hub_runs(shape: MixtralShape) -> dict[str, list[RowRun]]:
    """Every tensor of the hub's layout -> its rows in Megatron's."""
    runs: dict[str, list[RowRun]] = {name: [] for name in hub_shapes(shape)}
    for link in links(shape):
        runs[link.hub.name].append(RowRun(link.megatron, link.hub.name))
    return runs


def hub_targets(shape: MixtralShape, source: Source, dtype: str | None) -> Iterator[Target]:
    """Every tensor of the hub's layout, assembled from its rows in Megatron's."""
    runs = hub_runs(shape)
    for name, sizes in hub_shapes(shape).items():
        stored = (source.base if isinstance(source, merged.Merged) else source).dtype(runs[name][0].rows.name)
        yield Target(name, (0,) * len(sizes), sizes, dtype or stored, tuple(runs[name]))
