"""Loads a run's data: checks it against the model, and makes each step's batches during the previous step.

Shapes: B sequences of S tokens; packed ones are laid end to end, [1, B * S], with the segments in `packed`.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_mixtral.data import dataset, prepare, validate
from megatron_mixtral.data.blend import Blend
from megatron_mixtral.data.dataset import Documents, Sample, Samples
from megatron_mixtral.data.packing import PackedSamples
from megatron_mixtral.distributed import collectives
from megatron_mixtral.errors import InputError
from megatron_mixtral.mcore import ranks
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.tokenization import chat, own_templates, tokenizer

from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

Sequences = Samples | PackedSamples | Blend


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and validation samples. `identity` names data and order; a resumed run must have the same."""

    train: Sequences
    validation: Sequences | None
    identity: dict[str, Any]
    masked: bool  # whether some tokens aren't learnt
    notes: tuple[str, ...]
    forms: frozenset[str | None] = frozenset()  # chat templates of the conversations; None is Mixtral's

    def assets(self, source: Path) -> dict[str, bytes]:
        """What goes with the trained weights so that they are asked as they learnt; nothing where `source` does."""
        words = tokenizer.find(source)
        if words is None:
            return {}
        template = {"chat_template.jinja": _template(words, next(iter(self.forms)))} if self.forms else {}
        return {name: text.encode() for name, text in template.items() if text} | _ends(words, source)


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One micro batch: ids, labels and positions (int64) and mask (float32), all alike in shape."""

    ids: torch.Tensor
    labels: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    packed: PackedSeqParams | None

    def on_device(self) -> "MicroBatch":
        place = ranks.device()
        if place.type == "cpu":
            return self
        moved = {n: getattr(self, n).to(place, non_blocking=True) for n in ("ids", "labels", "mask", "positions")}
        packed = self.packed
        if packed:
            ends = packed.cu_seqlens_q.to(place)
            packed = replace(packed, cu_seqlens_q=ends, cu_seqlens_kv=ends)
        return MicroBatch(**moved, packed=packed)


def read(config: FinetuneConfig, shape: MixtralShape, source: Path) -> Corpus:
    """Open and check the data; all ranks call it. `InputError` for data that doesn't fit the model or the batch."""
    given = checks.blend(config.data)
    parts = [_part(config, Path(prefix).expanduser(), shape, source) for prefix, _ in given]
    weights = [
        part.train.tokens if weight is None else weight for part, (_, weight) in zip(parts, given, strict=True)
    ]
    notes = tuple(note for part in parts for note in part.notes)
    corpus = parts[0]
    if len(parts) > 1:
        corpus = _blended(config, parts, weights)
        notes += (_tell_blend(given, parts, weights),)
    train, prefixes = corpus.train, ", ".join(prefix for prefix, _ in given)
    if train.per_epoch < config.global_batch:
        raise InputError(
            f"{prefixes}: {train.per_epoch} sequences of {config.sequence_length} tokens are less than one batch "
            f"of {config.global_batch}; give more data, a smaller global_batch or a shorter sequence_length"
        )
    return replace(corpus, notes=notes)


def _part(config: FinetuneConfig, prefix: Path, shape: MixtralShape, source: Path) -> Corpus:
    """One of a run's data sets."""

    def look() -> str:
        Documents(prefix)  # rank 0 reads first, and its error is raised on all ranks
        return _check_tokenizer(prefix, shape, source)

    notes = [collectives.on_first_rank(look)]
    documents = Documents(prefix)
    digest = validate.check(documents, shape.vocab_size)
    packing = config.packing or ("stream" if documents.masks is None else "documents")
    checks.check_packing(packing, config.layout.context)
    divided = dataset.split(len(documents), config.validation, config.seed)
    train = _samples(config, documents, divided.train, packing, pad=False)
    if isinstance(train, PackedSamples):
        notes.append(_tell_packing(train, packing))
    validation = None
    if len(divided.validation):
        validation = _samples(config, documents, divided.validation, packing, pad=True)
    elif config.validation:
        notes.append("no validation: the data is a single document")
    order = {n: getattr(config, n) for n in ("sequence_length", "validation", "seed")}
    return Corpus(
        train=train,
        validation=validation,
        identity={"digest": digest, "packing": packing, **order},
        masked=documents.masks is not None or isinstance(train, PackedSamples),
        notes=tuple(note for note in notes if note),
        forms=_forms(prefix),
    )


def _forms(prefix: Path) -> frozenset[str | None]:
    described = prepare.meta(prefix) or {}
    return frozenset({described.get("chat_template")} if described.get("masked") else ())


def _template(words: tokenizer.Tokenizer, learnt: str | None) -> str | None:
    """The chat template that `learnt` stands for, where the tokenizer's own isn't it; None: Mistral's own form."""
    own = words.chat_template
    if learnt is not None:
        return None if learnt == own else learnt
    if own is None or own_templates.writes(own, words, chat.own(words)):
        return None
    return own_templates.source(words)


def _ends(words: tokenizer.Tokenizer, source: Path) -> dict[str, bytes]:
    """The two files that tell transformers where to stop, where they don't name each end token that is learnt."""
    changed = {}
    for name in ("config.json", "generation_config.json"):
        file = source / name
        if not file.is_file():
            continue  # without generation_config.json transformers looks at config.json
        said = json.loads(file.read_bytes())
        value = said.get("eos_token_id")
        if words.eos not in (value if isinstance(value, list) else [value]):
            ends = list(words.ends) if len(words.ends) > 1 else words.eos
            changed[name] = json.dumps(said | {"eos_token_id": ends}, indent=2).encode() + b"\n"
    return changed


def _blended(config: FinetuneConfig, parts: list[Corpus], weights: list[float]) -> Corpus:
    """All parts as one; its identity has the parts' identities and weights."""
    held = [(p.validation, w) for p, w in zip(parts, weights, strict=True) if p.validation]
    shares = {"weights": [float(weight) for weight in weights]}
    each = {name: [part.identity[name] for part in parts] for name in ("digest", "packing")}
    forms = frozenset().union(*(part.forms for part in parts))
    if len(forms) > 1:
        raise InputError(f"{', '.join(config.data)}: their conversations have different chat templates")
    return Corpus(
        train=Blend([part.train for part in parts], weights),
        validation=Blend([v for v, _ in held], [w for _, w in held]) if held else None,
        identity={**parts[0].identity, **each, **shares},
        masked=any(part.masked for part in parts),
        notes=(),
        forms=forms,
    )


def _tell_blend(given: list[tuple[str, float | None]], parts: list[Corpus], weights: list[float]) -> str:
    told = ", ".join(
        f"{weight / sum(weights):.1%} {prefix} ({part.train.per_epoch:,} sequences)"
        for (prefix, _), part, weight in zip(given, parts, weights, strict=True)
    )
    return f"blend: {told}"


def same(config: FinetuneConfig, found: dict[str, Any], saved: dict[str, Any]) -> None:
    """`InputError` if a resumed run's data or its order differs from the run's beginning."""
    for name, before in saved.items():
        if found.get(name) == before:
            continue
        what = "other tokens" if name == "digest" else f"{name} {found.get(name)} in place of {before}"
        where = config.data if isinstance(config.data, str) else ", ".join(config.data)
        raise InputError(
            f"{where}: {what} than when this run began, so it can't be resumed; put it back, or start a new "
            "run with this one as its model"
        )


def _samples(
    config: FinetuneConfig, documents: Documents, chosen: np.ndarray, packing: str, *, pad: bool
) -> Samples | PackedSamples:
    if packing == "stream":
        return Samples(documents, chosen, config.sequence_length, config.seed, pad=pad)
    return PackedSamples(documents, chosen, config.sequence_length, config.seed, share=packing == "documents")


def _tell_packing(train: PackedSamples, packing: str) -> str:
    how = "packed, and none sees another" if packing == "documents" else "one a sequence"
    cut = f"; longer ones were cut {train.cut} times" if train.cut else ""
    cut += f", {train.left_out} parts without learnt tokens left out" if train.left_out else ""
    return f"documents {how}: {train.per_epoch:,} sequences, {train.waste:.1%} of their tokens are padding{cut}"


def _check_tokenizer(prefix: Path, shape: MixtralShape, source: Path) -> str:
    """Compare the tokenizer of the data with the model's; returns a note if that isn't possible."""
    described = prepare.meta(prefix)
    if not described:
        return f"{prefix}.json isn't there (prepare writes it), so the data's tokenizer isn't checked"
    if described["vocab_size"] > shape.vocab_size:
        raise InputError(
            f"{prefix}: prepared with {described['vocab_size']} tokens, but the model knows {shape.vocab_size}"
        )
    words = tokenizer.find(source)
    if not words:
        return f"{source} has no tokenizer, so the data's tokenizer isn't checked"
    rendered = described.get("chat_template") is not None
    known = described.get("ids")  # data that was prepared before has the table's digest alone
    if described["tokenizer"] != tokenizer.digest(words) or (
        known is not None and known != tokenizer.ids_digest(words, rendered=rendered)
    ):
        raise InputError(f"{prefix}: prepared with a tokenizer that differs from the model's in {source}")
    return ""


class Feed:
    """Batches of one data-parallel replica; a thread makes those of the next step in advance."""

    def __init__(self, samples: Sequences, config: FinetuneConfig, replica: int, replicas: int) -> None:
        self._samples, self._config, self._place = samples, config, (replica, replicas)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[list[MicroBatch]]] | None = None

    def take(self, first: int, *, ahead: bool = False) -> list[MicroBatch]:
        """The micro batches of the step that begins at sample `first`; `ahead` starts those of the next step."""
        known = self._ahead and self._ahead[0] == first
        made = self._ahead[1].result() if self._ahead and known else self._make(first)
        if ahead:
            following = first + self._config.global_batch
            self._ahead = following, self._thread.submit(self._make, following)
        return made

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _make(self, first: int) -> list[MicroBatch]:
        config, (replica, replicas) = self._config, self._place
        chosen = dataset.numbers(
            first,
            global_batch=config.global_batch,
            micro_batch=config.micro_batch,
            rank=replica,
            replicas=replicas,
        )
        made = [_batch([self._samples.sample(n) for n in numbers]) for numbers in chosen]
        return made if config.layout.context == 1 else [_stretches(batch) for batch in made]


def _batch(samples: list[Sample]) -> MicroBatch:
    ids, labels, mask = (
        torch.from_numpy(np.stack([getattr(s, n) for s in samples])) for n in ("ids", "labels", "mask")
    )
    stretches = [length for s in samples for length in s.lengths]
    if len(stretches) == len(samples):
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        return MicroBatch(ids=ids, labels=labels, mask=mask.float(), positions=positions, packed=None)
    flat = {"ids": ids.view(1, -1), "labels": labels.view(1, -1), "mask": mask.float().view(1, -1)}
    positions = torch.cat([torch.arange(length) for length in stretches])[None]
    return MicroBatch(**flat, positions=positions, packed=_params(stretches))


def _stretches(whole: MicroBatch) -> MicroBatch:
    """This context-parallel rank's two segments of each sequence, one from either end."""
    rank, size = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()

    def mine(x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(2 * size, dim=1)
        return torch.cat([parts[rank], parts[2 * size - 1 - rank]], dim=1)

    fields = {name: mine(getattr(whole, name)) for name in ("ids", "labels", "mask", "positions")}
    return MicroBatch(**fields, packed=None)


def _params(stretches: list[int]) -> PackedSeqParams:
    ends = torch.zeros(len(stretches) + 1, dtype=torch.int32)
    ends[1:] = torch.tensor(stretches).cumsum(0)
    longest = max(stretches)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
