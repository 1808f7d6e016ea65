"""Low-rank adapters as tensors: W + alpha/rank * B A, whose W, by which names in a checkpoint. Pure, no torch.

Each adapted matrix of the hub's model has one pair, lora_A [rank, in] and lora_B [out, rank], also where Megatron
keeps several of them in one tensor: so what is trained here is what PEFT holds, number for number. Experts are
adapted as transformers 5 keeps them, gate and up in one matrix.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from blake3 import blake3

from megatron_mixtral.errors import CheckpointError
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import tensors
from megatron_mixtral.weights.copying import Source, read_rows
from megatron_mixtral.weights.tensors import EXPERTS, LAYER, Rows, megatron_axes

KIND = "adapter"  # of a weights folder that holds these alone
OF_ATTENTION = f"{LAYER}.self_attention.adapters"
OF_EXPERTS = f"{EXPERTS}.adapters"
SIDES = ("lora_A", "lora_B")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What is adapted, and how."""

    rank: int
    alpha: float
    experts: bool = False  # beside the attention's four matrices
    dropout: float = 0.0  # of what goes into an adapter, in training

    @property
    def scale(self) -> float:
        """What the product of a pair counts."""
        return self.alpha / self.rank

    @classmethod
    def asked(cls, config: FinetuneConfig) -> "Lora | None":
        """What a run's configuration asks for; None is to train the whole model."""
        if not config.lora:
            return None
        alpha = config.lora_alpha or 2.0 * config.lora
        return cls(rank=config.lora, alpha=alpha, experts=config.lora_experts, dropout=config.lora_dropout)


@dataclass(frozen=True, slots=True)
class Pair:
    """The adapter of one matrix [out, in] of every layer, or of every expert of every layer."""

    name: str
    out: int
    into: int

    def side(self, which: str) -> str:
        """Name of lora_A or lora_B in a checkpoint."""
        return f"{self.name}.{which}"


@dataclass(frozen=True, slots=True)
class Span:
    """Rows start:stop of a plane of the base's tensor are those of the pair's matrix from `first` on."""

    start: int
    stop: int
    pair: Pair
    first: int


def is_adapter(name: str) -> bool:
    """Whether a parameter or tensor of this name is one of an adapter."""
    return ".adapters." in name


def pairs(shape: MixtralShape, lora: Lora) -> dict[str, Pair]:
    """The hub's name of a matrix -> its adapter."""
    hidden, queries = shape.hidden_size, shape.num_attention_heads * shape.head_dim
    keys, width = shape.num_key_value_heads * shape.head_dim, shape.intermediate_size
    sizes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    sizes["o_proj"] = (hidden, queries)
    found = {name: Pair(f"{OF_ATTENTION}.{name}", *size) for name, size in sizes.items()}
    if lora.experts:
        for name, size in {"gate_up_proj": (2 * width, hidden), "down_proj": (hidden, width)}.items():
            found[name] = Pair(f"{OF_EXPERTS}.{name}", *size)
    return found


def shapes(shape: MixtralShape, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Name -> global shape of every tensor of an adapter checkpoint: layers, then experts, come first."""
    found = {}
    for pair in pairs(shape, lora).values():
        front = (shape.num_hidden_layers, shape.num_local_experts)[: megatron_axes(pair.name)]
        found[pair.side("lora_A")] = (*front, lora.rank, pair.into)
        found[pair.side("lora_B")] = (*front, pair.out, lora.rank)
    return found


def spans(shape: MixtralShape, lora: Lora) -> dict[str, list[Span]]:
    """Megatron's tensor -> which rows of each of its planes which pair changes."""
    found: dict[str, list[Span]] = {}
    known = pairs(shape, lora)
    for link in tensors.links(shape, tensors.Names(fused=True)):
        name = link.hub.name.removesuffix(".weight").rpartition(".")[2]
        if name in known and not any(link.megatron.index):  # all planes are alike
            span = Span(link.megatron.start, link.megatron.stop, known[name], link.hub.start)
            found.setdefault(link.megatron.name, []).append(span)
    return found


def describe(lora: Lora, base: dict[str, Any]) -> dict[str, Any]:
    """What `mixlaunch.json` says of an adapter checkpoint."""
    return {"lora": asdict(lora), "base": base}


def described(marker: dict[str, Any], folder: Any) -> Lora:
    """The same read back; `CheckpointError` when it isn't there."""
    try:
        return Lora(**marker["lora"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: its mixlaunch.json doesn't describe adapters: {error!r}") from error


def check_same(folder: Any, marker: dict[str, Any], lora: Lora | None) -> None:
    """`CheckpointError` when a run that trained one thing is to go on with another."""
    found = described(marker, folder) if marker.get("kind") == KIND else None
    if found != lora:
        raise CheckpointError(f"{folder}: this run trained {in_words(found)}; it can't go on with {in_words(lora)}")


def in_words(lora: Lora | None) -> str:
    """What is trained."""
    if lora is None:
        return "the whole model"
    where = "attention and experts" if lora.experts else "attention"
    dropout = f", dropout {lora.dropout:g}" if lora.dropout else ""
    return f"adapters of {where}, rank {lora.rank}, alpha {lora.alpha:g}{dropout}"


def share(shape: MixtralShape, lora: Lora) -> str:
    """One line: what is trained, and how little of the model that is."""
    own, whole = (sum(map(prod, sizes.values())) for sizes in (shapes(shape, lora), tensors.shapes(shape)))
    return f"training {in_words(lora)}: {own:,} parameters beside {whole:,} that stay as they are"


# --- the base that adapters belong to -----------------------------------------------------------------------------


def identity(source: Source, shape: MixtralShape) -> str:
    """Tells one model's weights from another's: a digest of three rows of every plane.

    It is the same for every layout and format in which the weights lie, so long as their type is.
    """
    digest = blake3()
    for rows in _samples(shape):
        digest.update(read_rows(source, rows))
    return digest.hexdigest()


def _samples(shape: MixtralShape) -> Iterator[Rows]:
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for link in tensors.links(shape):
        plane = link.megatron.name, link.megatron.index
        sizes[plane] = max(sizes.get(plane, 0), link.megatron.stop)
    for (name, index), count in sizes.items():
        for row in sorted({0, count // 2, count - 1}):
            yield Rows(name, index, row, row + 1)
