"""What can't be, said once: values, options that contradict each other, and layouts that don't come out whole.

Both sides refuse with these words. The launcher does before a queue is waited in, the job for a configuration that
was written by hand.
"""

import dataclasses
import difflib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import yaml

from megatron_mixtral.spec.jobs import JOBS, ConvertConfig, FinetuneConfig, ServeConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import LayoutSpecError, Option, SpecError, options
from megatron_mixtral.spec.shape import MixtralShape

T = TypeVar("T")


class Trains(Protocol):
    """The numbers of a training that its layout has to divide, by the names of finetune's options."""

    @property
    def sequence_length(self) -> int: ...
    @property
    def micro_batch(self) -> int: ...
    @property
    def global_batch(self) -> int: ...
    @property
    def virtual_pipeline(self) -> int: ...
    @property
    def first_stage_layers(self) -> int: ...
    @property
    def last_stage_layers(self) -> int: ...


# --- values -------------------------------------------------------------------------------------------------------


def load(job: str, path: Path) -> Any:
    """Read `path` as the configuration of `job`; `SpecError` names the key and lists the valid ones."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise SpecError("{}: {}", path, error) from error
    return parse(JOBS[job], raw or {}, where=str(path))


def parse(kind: type[T], raw: Any, *, where: str) -> T:
    """Strict mapping -> configuration: every key known, every required one there, nothing that can't be."""
    try:
        found = _parsed(kind, raw)
        check(found)
    except SpecError as error:
        raise type(error)(f"{{}}: {error.words}", where, *error.values) from error
    return found


def _parsed(kind: type[T], raw: Any) -> T:
    if not isinstance(raw, dict):
        raise SpecError("expected a mapping, got {}", type(raw).__name__)
    values = typed(kind, raw)
    if missing := [name for name, option in options(kind).items() if option.required and name not in raw]:
        raise SpecError("{} missing", ", ".join(missing))
    return kind(**values)


def typed(kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` with each value in its option's type and range; `SpecError` names an unknown one."""
    known = options(kind)
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise SpecError("there is no setting {!r}; {}Valid: {}", name, hint, ", ".join(known))
    return {name: _typed(known[name], value) for name, value in given.items()}


def _typed(option: Option, value: Any) -> Any:
    if not dataclasses.is_dataclass(option.kind):
        return option.checked(value)
    if isinstance(value, option.kind):
        return value
    try:
        return _parsed(option.kind, value)
    except SpecError as error:
        raise SpecError(f"{{{option.name}}}: {error.words}", *error.values) from error


def complete(kind: type[T], given: Mapping[str, Any]) -> T:
    """The configuration of `given` alone, for its checks: what a plan has still to fill in is empty."""
    empty = {name: "" for name, option in options(kind).items() if option.required}
    return kind(**empty | dict(given))


# --- contradictions -----------------------------------------------------------------------------------------------


def check(config: Any) -> None:
    """`SpecError` for all that can't be of a job's whole configuration, whatever its model."""
    check_options(config)
    if isinstance(config, FinetuneConfig):
        check_packing(config.packing or "stream", config.layout.context)
        check_chunks(config.layout, config)
        check_sequence(config.layout, config)
    elif isinstance(config, ServeConfig):
        check_answers(config.layout)


def check_options(config: Any, given: Collection[str] | None = None) -> None:
    """`SpecError` for values out of range and for options that contradict each other, layouts left out.

    `given` are the options that were asked for; those with another value than their default unless told.
    """
    known = options(type(config))
    typed(type(config), {name: getattr(config, name) for name, option in known.items() if not option.required})
    for name, option in known.items():
        asked = name in given if given is not None else getattr(config, name) != option.default
        if option.needs and asked and getattr(config, option.needs[0]) == known[option.needs[0]].default:
            raise SpecError(f"{{{name}}}: {option.needs[1]}")
    for kind, contradictions in CONTRADICTIONS.items():
        if isinstance(config, kind):
            contradictions(config)


def _convert(config: ConvertConfig) -> None:
    if config.format == "legacy" and config.to != "megatron":
        raise SpecError("{format}: legacy needs {to} megatron")
    if not config.max_shard_gb:
        raise SpecError("{max_shard_gb}: {} isn't a size", config.max_shard_gb)


def _finetune(config: FinetuneConfig) -> None:
    if config.min_lr > config.lr:
        raise SpecError("{lr}: {:g} is below {min_lr}, {:g}, where it ends", config.lr, config.min_lr)
    if config.fp8 != "none" and config.precision != "bf16":
        raise SpecError("{fp8}: needs {precision} bf16, not {}", config.precision)
    if config.fp8 != "none" and config.lora:
        raise SpecError("{fp8}: our layers compute adapters without FP8; remove {lora}")
    if config.lora_dropout == 1:
        raise SpecError("{lora_dropout}: must be below 1")
    if config.lora_experts and config.lora_dropout:
        raise SpecError("{lora_dropout}: adapters of experts have no dropout, as in PEFT; remove {lora_experts}")


def _serve(config: ServeConfig) -> None:
    if config.engine == "vllm" and config.fp8_experts:
        raise SpecError("{fp8_experts}: needs {engine} megatron")


CONTRADICTIONS: dict[type, Callable[[Any], None]] = {
    ConvertConfig: _convert,
    FinetuneConfig: _finetune,
    ServeConfig: _serve,
}


def check_capacity(config: FinetuneConfig, shape: MixtralShape) -> None:
    """`SpecError` for experts that would have to be filled up with more tokens than there are."""
    experts, chosen = shape.num_local_experts, shape.num_experts_per_tok
    if config.pad_to_capacity and config.capacity_factor > experts / chosen:
        raise SpecError(
            "{capacity_factor}: {:g}, but with {pad_to_capacity} at most {} experts / {} a token = {:g}, where "
            "each gets every token",
            *(config.capacity_factor, experts, chosen, experts / chosen),
        )


# --- layouts ------------------------------------------------------------------------------------------------------


def check_packing(packing: str, context: int) -> None:
    """`LayoutSpecError` for sequences of several documents whose ends context parallelism would not know."""
    if context > 1 and packing != "stream":
        raise LayoutSpecError(
            "{packing}: {}, but {context} {} splits whole sequences; use stream, or {context} 1", packing, context
        )


def check_answers(layout: Layout) -> None:
    """`LayoutSpecError` for a server that would split sequences."""
    if layout.context > 1:
        raise LayoutSpecError("{context}: {}, but an answer is generated token by token: use 1", layout.context)


def check_chunks(layout: Layout, work: Trains, layers: int | None = None) -> None:
    """`LayoutSpecError` when stages can't work on so many chunks of layers in turn."""
    chunks, stages = work.virtual_pipeline, layout.pipeline
    if chunks == 1:
        return
    if stages == 1:
        raise LayoutSpecError("{virtual_pipeline}: {}, but PP 1 has nothing to interleave; use 1", chunks)
    if work.first_stage_layers or work.last_stage_layers:
        raise LayoutSpecError(
            "{virtual_pipeline}: its chunks have equal lengths; remove {first_stage_layers}, {last_stage_layers}"
        )
    if layers is not None and layers % (stages * chunks):
        raise LayoutSpecError(
            "{virtual_pipeline}: {} layers / (PP {} x {} chunks) = {:.3g}, not whole",
            *(layers, stages, chunks, layers / stages / chunks),
        )


def sequence_parts(layout: Layout) -> int:
    """Segments of a sequence: TP ranks share its tokens, and each CP rank has an early and a late segment."""
    return layout.tensor * (2 * layout.context if layout.context > 1 else 1)


def check_sequence(layout: Layout, work: Trains) -> None:
    """`LayoutSpecError` for a sequence that the ranks can't share out."""
    parts = sequence_parts(layout)
    if work.sequence_length % parts:
        names = f"TP {layout.tensor}" + (f" x 2 x CP {layout.context}" if layout.context > 1 else "")
        raise LayoutSpecError(
            "{sequence_length}: {} / ({}) = {:.4g} isn't whole; use a multiple of {}",
            *(work.sequence_length, names, work.sequence_length / parts, parts),
        )


def rounds(layout: Layout, work: Trains) -> int:
    """Micro batches must be a multiple of this: a stage starts its next chunk after PP of them."""
    return layout.pipeline if work.virtual_pipeline > 1 else 1


def micro_batches(layout: Layout, work: Trains, data: int) -> int:
    """What one replica does in a step; whole, in whole `rounds`, or `LayoutSpecError` with the equation."""
    per_round, whole = work.micro_batch * data, rounds(layout, work)
    equation = f"{work.global_batch} = micro batch {work.micro_batch} x DP {data}"
    if work.global_batch % per_round:
        raise LayoutSpecError(
            "{global_batch}: {} x {:.3g} accumulated steps, which isn't whole; use a multiple of {}",
            *(equation, work.global_batch / per_round, per_round * whole),
        )
    count = work.global_batch // per_round
    if count % whole:
        raise LayoutSpecError(
            "{virtual_pipeline}: {} x {} micro batches, and {} / PP {} = {:.3g}, not whole; use a {global_batch} "
            "that is a multiple of {}",
            *(equation, count, count, whole, count / whole, per_round * whole),
        )
    return count


# --- data ---------------------------------------------------------------------------------------------------------


def blend(data: str | Sequence[str]) -> list[tuple[str, float | None]]:
    """Prefixes with the weights that are written behind them, PREFIX:WEIGHT; all have one or none."""
    entries = [data] if isinstance(data, str) else data
    parts = [_entry(entry) if len(entries) > 1 else (entry, None) for entry in entries]
    if not parts:
        raise SpecError("{data}: no prefix of prepared data")
    if len({weight is None for _, weight in parts}) > 1:
        raise SpecError(
            "{data}: {}: give a weight to each data set (PREFIX:WEIGHT), or to none", ", ".join(entries)
        )
    distinct([prefix for prefix, _ in parts])
    return parts


def distinct(prefixes: Sequence[str]) -> tuple[str, ...]:
    """`prefixes`, unless one is there twice."""
    if len(set(prefixes)) < len(prefixes):
        raise SpecError("{data}: {} is there twice", next(p for p in prefixes if prefixes.count(p) > 1))
    return tuple(prefixes)


def _entry(entry: str) -> tuple[str, float | None]:
    prefix, colon, written = entry.rpartition(":")
    try:
        weight = float(written) if colon and prefix else None
    except ValueError:
        weight = None
    if weight is None:
        return entry, None
    if not (weight > 0 and math.isfinite(weight)):
        raise SpecError("{data}: {!r}: a weight is a number above 0", entry)
    return prefix, weight
