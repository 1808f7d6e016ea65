"""Megatron's older checkpoints: a `mp_rank_TT(_PPP)(_EEE)/model_optim_rng.pt` for each model-parallel rank.

The layout decides which rows of which tensor are in which file, for writing and for reading, without megatron-core
or torch. The vocabulary is padded by copies of its last row, as upstream's converter does.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil, lcm, prod
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import CheckpointError, InputError, LayoutError
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.rundir import MARKER
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import tensors, torch_archive
from megatron_mixtral.weights.copying import Files, RowRun, Target, Unit
from megatron_mixtral.weights.hub import Stored
from megatron_mixtral.weights.tensors import EXPERTS, ITEMSIZE, LAYER, Names, RowLink, Rows, links, megatron_axes
from megatron_mixtral.weights.torch_archive import Call, Chunk, Tensor
from megatron_mixtral.weights.torch_dist import TorchDistFolder

FILE = "model_optim_rng.pt"
KIND = "legacy"  # in the folder's mixlaunch.json

# Parameter names of each kind of layers: the norm before attention, and an expert's two matrices.
NAMES = {
    "te-grouped": ("self_attention.linear_qkv.layer_norm_weight", "mlp.experts.{product}.weight{expert}"),
    "te": ("self_attention.linear_qkv.layer_norm_weight", "mlp.experts.local_experts.{expert}.{product}.weight"),
    "local": ("input_layernorm.weight", "mlp.experts.local_experts.{expert}.{product}.weight"),
}


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Everything that decides the files and their contents."""

    shape: MixtralShape
    layout: Layout
    names: str
    make_vocab_size_divisible_by: int

    def __post_init__(self) -> None:
        if self.names not in NAMES:
            raise InputError(f"names: {self.names!r} isn't one of {', '.join(NAMES)}")
        if self.make_vocab_size_divisible_by < 1:
            raise InputError(
                f"make_vocab_size_divisible_by: {self.make_vocab_size_divisible_by} must be at least 1"
            )

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding, with padding."""
        multiple = self.make_vocab_size_divisible_by * self.layout.tensor
        return ceil(self.shape.vocab_size / multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class ModelRank:
    """One model-parallel rank."""

    tensor: int
    pipeline: int
    expert: int
    expert_tensor: int

    def folder(self, layout: Layout) -> str:
        """Named as upstream names it."""
        stage = f"_{self.pipeline:03d}" if layout.pipeline > 1 else ""
        return f"mp_rank_{self.tensor:02d}{stage}" + (f"_{self.expert:03d}" if layout.expert > 1 else "")


def model_ranks(layout: Layout) -> list[ModelRank]:
    """Every rank with a file of its own; `LayoutError` if two different files would have the same name."""
    experts: dict[tuple[int, int], int] = {}
    for rank in range(lcm(layout.tensor, layout.expert * layout.expert_tensor)):
        pair = rank % layout.tensor, rank // layout.expert_tensor % layout.expert
        if experts.setdefault(pair, rank % layout.expert_tensor) != rank % layout.expert_tensor:
            raise LayoutError(
                f"expert-tensor {layout.expert_tensor}, tensor {layout.tensor}: legacy files are named by tensor "
                f"and expert rank, so two different files would have one name; use expert-tensor {layout.tensor}"
            )
    return [
        ModelRank(tensor=tensor, pipeline=stage, expert=expert, expert_tensor=part)
        for stage in range(layout.pipeline)
        for (tensor, expert), part in sorted(experts.items())
    ]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A parameter of one rank: runs of rows of Megatron's whole tensor, one after another, or some columns."""

    key: str
    rows: tuple[Rows, ...]
    columns: tuple[int, int] | None = None

    def sizes(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Its own shape, in a tensor of shape `whole`."""
        axes = len(self.rows[0].index)
        rest = whole[axes + 1 :] if self.columns is None else (self.columns[1] - self.columns[0],)
        return (sum(map(len, self.rows)), *rest)


def parts(cut: Cut, place: ModelRank) -> Iterator[Part]:
    """What a rank's model holds."""
    stages = cut.layout.stages(cut.shape.num_hidden_layers)
    each = cut.vocabulary // cut.layout.tensor
    mine = place.tensor * each, (place.tensor + 1) * each
    embedding, last = "embedding.word_embeddings.weight", cut.layout.pipeline - 1
    if place.pipeline == 0:
        yield Part(key=embedding, rows=(Rows(embedding, (), *mine),))
    for number in range(stages[place.pipeline]):
        layer = sum(stages[: place.pipeline]) + number
        yield from _layer(cut, place, f"decoder.layers.{number}", layer)
        yield from _experts(cut, place, f"decoder.layers.{number}", layer)
    if place.pipeline == last:
        norm = "decoder.final_layernorm.weight"
        yield Part(key=norm, rows=(Rows(norm, (), 0, cut.shape.hidden_size),))
        if not cut.shape.tie_word_embeddings:
            yield Part(key="output_layer.weight", rows=(Rows("output_layer.weight", (), *mine),))
        elif last > 0:  # this stage has a copy of the first stage's embedding
            yield Part(key="output_layer.weight", rows=(Rows(embedding, (), *mine),))


def _layer(cut: Cut, place: ModelRank, prefix: str, layer: int) -> Iterator[Part]:
    """Attention, norms and router; the output projection is divided by columns."""
    hidden, parallel = cut.shape.hidden_size, cut.layout.tensor
    whole = tensors.shapes(cut.shape)
    norm = f"{LAYER}.self_attention.linear_qkv.layer_norm_weight"
    yield Part(key=f"{prefix}.{NAMES[cut.names][0]}", rows=(Rows(norm, (layer,), 0, hidden),))
    qkv = f"{LAYER}.self_attention.linear_qkv.weight"
    each = whole[qkv][1] // parallel
    rows = Rows(qkv, (layer,), place.tensor * each, (place.tensor + 1) * each)
    yield Part(key=f"{prefix}.self_attention.linear_qkv.weight", rows=(rows,))
    projection = f"{LAYER}.self_attention.linear_proj.weight"
    yield Part(
        key=f"{prefix}.self_attention.linear_proj.weight",
        rows=(Rows(projection, (layer,), 0, hidden),),
        columns=_share(whole[projection][2], place.tensor, parallel),
    )
    norm = f"{LAYER}.pre_mlp_layernorm.weight"
    yield Part(key=f"{prefix}.pre_mlp_layernorm.weight", rows=(Rows(norm, (layer,), 0, hidden),))
    router = Rows(f"{LAYER}.mlp.router.weight", (layer,), 0, cut.shape.num_local_experts)
    yield Part(key=f"{prefix}.mlp.router.weight", rows=(router,))


def _experts(cut: Cut, place: ModelRank, prefix: str, layer: int) -> Iterator[Part]:
    """This rank's experts: its share of the gate above its share of up (linear_fc1), and columns of down (fc2)."""
    width, count = cut.shape.intermediate_size, cut.shape.num_local_experts // cut.layout.expert
    parallel = cut.layout.expert_tensor
    each = width // parallel
    for number in range(count):
        expert, key = place.expert * count + number, f"{prefix}.{NAMES[cut.names][1]}"
        first = place.expert_tensor * each
        gate, up = (
            Rows(f"{EXPERTS}.linear_fc1.weight", (layer, expert), start, start + each)
            for start in (first, width + first)
        )
        yield Part(key=key.format(product="linear_fc1", expert=number), rows=(gate, up))
        yield Part(
            key=key.format(product="linear_fc2", expert=number),
            rows=(Rows(f"{EXPERTS}.linear_fc2.weight", (layer, expert), 0, cut.shape.hidden_size),),
            columns=_share(width, place.expert_tensor, parallel),
        )


def _share(columns: int, rank: int, of: int) -> tuple[int, int] | None:
    each = columns // of
    return (rank * each, (rank + 1) * each) if of > 1 else None


# --- writing ------------------------------------------------------------------------------------------------------


def files(cut: Cut, names: Names, types: dict[str, str]) -> list[Unit]:
    """A unit for each rank, read from a hub folder with these names; `types` has Megatron's names as keys."""
    planes: dict[tuple[str, tuple[int, ...]], list[RowLink]] = {}
    for link in links(cut.shape, names):
        planes.setdefault((link.megatron.name, link.megatron.index), []).append(link)
    return [_unit(cut, place, planes, types) for place in model_ranks(cut.layout)]


def _unit(cut: Cut, place: ModelRank, planes: dict[Any, list[RowLink]], types: dict[str, str]) -> Unit:
    whole, folder = tensors.shapes(cut.shape), place.folder(cut.layout)
    targets = []
    for part in parts(cut, place):
        name, digest = part.rows[0].name, f"{folder}/{part.key}"
        sizes = part.sizes(whole[name])
        runs = [
            run for rows in part.rows for run in _runs(rows, planes[rows.name, rows.index], digest, part.columns)
        ]
        targets.append(Target(part.key, (0,) * len(sizes), sizes, types[name], tuple(runs)))
    _, offsets = _framed(targets)
    return Unit(f"{folder}/{FILE}", tuple(targets), tuple(offsets))


def _runs(rows: Rows, plane: list[RowLink], digest: str, columns: tuple[int, int] | None) -> Iterator[RowRun]:
    """The hub's rows for Megatron's `rows`; padding rows repeat the vocabulary's last row."""
    for link in plane:
        start, stop = max(rows.start, link.megatron.start), min(rows.stop, link.megatron.stop)
        if start < stop:
            first = link.hub.start + start - link.megatron.start
            yield RowRun(Rows(link.hub.name, link.hub.index, first, first + stop - start), digest, columns)
    last = plane[-1]
    for _ in range(max(rows.start, last.megatron.stop), rows.stop):
        yield RowRun(Rows(last.hub.name, last.hub.index, last.hub.stop - 1, last.hub.stop), digest, columns)


def frames(unit: Unit) -> list[tuple[int, bytes]]:
    """Offset and bytes of everything around the unit's targets in the archive."""
    return _framed(unit.targets)[0]


def _framed(targets: Iterable[Target]) -> tuple[list[tuple[int, bytes]], list[int]]:
    """The archive that upstream's loader reads, without the targets' bytes, and the targets' offsets.

    It has no `args`: upstream doesn't need them, and without them no code in the file runs when it is read.
    """
    targets = list(targets)
    model: dict[str, Call | None] = {
        target.name: torch_archive.tensor(target.sizes, target.dtype, record=number)
        for number, target in enumerate(targets)
    }
    model |= dict.fromkeys(_extra_states(model))
    content = {"checkpoint_version": 3.0, "iteration": 0, "model": model}
    return torch_archive.around(torch_archive.pickled(content), [target.nbytes for target in targets])


def _extra_states(names: Iterable[str]) -> list[str]:
    """The empty objects that Transformer Engine's modules need, if the names are theirs."""
    names = list(names)
    if not any("layer_norm_weight" in name for name in names):
        return []
    modules = (re.sub(r"\.weight\d*$", "._extra_state", name) for name in names if ".linear_" in name)
    return [name for name in dict.fromkeys(modules) if name.endswith("._extra_state")]


# --- reading ------------------------------------------------------------------------------------------------------


class LegacyFolder(TorchDistFolder):
    """The model's tensors in a folder of such files, as a source of rows."""

    def __init__(self, folder: Path, cut: Cut) -> None:
        self.folder, self.cut = folder, cut
        self.files = Files()
        self._planes = {}
        self.parameters: dict[str, Stored] = {}  # `mp_rank_../KEY` -> its place
        whole = tensors.shapes(cut.shape)
        for name in whole.keys() & set(tensors.PADDED):
            whole[name] = (cut.vocabulary, *whole[name][1:])
        self.tensors: dict[str, Tensor] = {}
        seen: set[tuple[Any, ...]] = set()  # several ranks hold the same tensor
        for place in model_ranks(cut.layout):
            for name, dtype, chunk in self._chunks(place, whole):
                if (box := (name, chunk.offsets, chunk.sizes)) not in seen:
                    seen.add(box)
                    self.tensors.setdefault(name, Tensor(dtype, whole[name])).chunks.append(chunk)

    def _chunks(self, place: ModelRank, whole: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, str, Chunk]]:
        """Each run of rows in a rank's file, as a box of the whole tensor."""
        folder = place.folder(self.cut.layout)
        path = self.folder / folder / FILE
        found = read_parameters(path)
        for part in parts(self.cut, place):
            name, stored = part.rows[0].name, found.pop(part.key, None)
            sizes = part.sizes(whole[name])
            if stored is None:
                raise CheckpointError(f"{path}: tensor {part.key} is missing")
            if stored.shape != sizes:
                made = f"config.json and the layout make it {list(sizes)}"
                raise CheckpointError(f"{path}: tensor {part.key} has shape {list(stored.shape)}; {made}")
            self.parameters[f"{folder}/{part.key}"] = stored
            axes, at = megatron_axes(name), stored.offset
            row = prod(sizes[1:]) * ITEMSIZE[stored.dtype]
            for rows in part.rows:
                left = [part.columns[0] if part.columns else 0] * (len(whole[name]) - axes - 1)
                box = (*rows.index, rows.start, *left), (*(1 for _ in rows.index), len(rows), *sizes[1:])
                yield name, stored.dtype, Chunk(*box, f"{folder}/{FILE}", at, len(rows) * row)
                at += len(rows) * row
        if found:
            raise CheckpointError(f"{path}: tensor {min(found)} isn't part of the model that config.json describes")

    def _place(self, chunk: Chunk, name: str, dtype: str) -> int:
        return chunk.place


def read_parameters(path: Path) -> dict[str, Stored]:
    """Key -> offset of every tensor of a rank's model."""
    try:
        value, where = torch_archive.read_archive(path)
        found = {key: where(tensor) for key, tensor in value["model"].items() if "_extra_state" not in key}
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing") from error
    except Exception as error:  # damaged bytes can raise anything
        raise CheckpointError(f"{path}: damaged or truncated: {error!r}") from error
    return {key: Stored(path, tensor.dtype, tensor.shape, place) for key, (tensor, place) in found.items()}


def open_weights(folder: Path, shape: MixtralShape, marker: dict[str, Any]) -> TorchDistFolder:
    """The tensors of a weights folder of either kind; its mixlaunch.json, `marker`, tells which."""
    if marker.get("kind") != KIND:
        found = TorchDistFolder(folder)
    else:
        found = LegacyFolder(folder, _described(folder, shape, marker))
    found.check(tensors.shapes(shape), tensors.PADDED)
    return found


def _described(folder: Path, shape: MixtralShape, marker: dict[str, Any]) -> Cut:
    """How the files of a folder are divided, by its mixlaunch.json."""
    try:
        return Cut(shape=shape, layout=Layout(**marker["layout"]), **marker["legacy"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MARKER}: doesn't say how its files are divided: {error!r}") from error
