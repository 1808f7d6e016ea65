"""Compares the logits of a model's two folders: the hub's with transformers, and Megatron's with megatron-core.

It holds whole models if memory allows, else one layer of each at a time. Both compute in fp32 with the weights as
they were written, so only the order of sums differs.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mixtral.checkpoint import save_load
from megatron_mixtral.errors import CheckpointError, InputError, JobError
from megatron_mixtral.mcore import cpu, ranks
from megatron_mixtral.model import build
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.tokenization import tokenizer
from megatron_mixtral.weights import folder as weights_folder
from megatron_mixtral.weights import legacy, lora, merged, tensors
from megatron_mixtral.weights.copying import BLOCK, Source, read_rows
from megatron_mixtral.weights.hub import open_model
from megatron_mixtral.weights.tensors import Names, Rows, links, megatron_axes

from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories

SPARE = 1.5  # memory needed for whole models, in sizes of one model in fp32


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The rows to read, and the type to which values are rounded first."""

    source: Source
    dtype: str | None

    def read(self, rows: Rows, out: Tensor) -> None:
        """Fill `out`, a few rows at a time."""
        stored = getattr(torch, self.source.dtype(rows.name))
        for part in rows.cut(BLOCK // self.source.row_bytes(rows.name)):
            values = torch.frombuffer(read_rows(self.source, part), dtype=stored)
            if self.dtype:
                values = values.to(getattr(torch, self.dtype))
            here = out[part.start - rows.start : part.stop - rows.start]
            here.copy_(values.view(here.shape))


def check(
    hub: Path, megatron: Path, *, dtype: str | None, prompt: str, tolerance: float, base: str | None = None
) -> str:
    """Print and return the largest difference; `CheckpointError` when it is above `tolerance` of the largest logit.

    `dtype` is the type to which the conversion rounded the weights, if any; `base` as in `merging.find_base`.
    """
    shape = MixtralShape.from_folder(hub)
    tokens = _tokens(hub, shape, prompt)
    megatron = weights_folder.resolve(megatron)
    marker = weights_folder.read_marker(megatron)
    fits = SPARE * 4 * sum(map(prod, tensors.shapes(shape).values())) < available()
    with alone(), torch.no_grad():
        try:
            expected = (whole_reference if fits else reference_by_layers)(hub, shape, tokens, dtype)
        except (JobError, MemoryError):
            raise
        except Exception as error:  # it can raise many errors
            refused = f"transformers can't load it, so there is nothing to compare with: {error!r}"
            raise InputError(f"{hub}: {refused}") from error
        if fits and marker.get("kind") not in (legacy.KIND, lora.KIND):
            found = whole_model(megatron, shape, tokens, dtype)
        else:
            weights = Weights(source=merged.open_weights(megatron, shape, base=base), dtype=dtype)
            found = model_by_layers(weights, shape, tokens)
    scale, off = float(expected.abs().max()), float((found - expected).abs().max())
    how = "whole models" if fits else "layer by layer"
    said = f"logits of {tokens.shape[1]} tokens: largest difference {off:.2g}, largest logit {scale:.3g} ({how})"
    if not off <= tolerance * scale:  # NaN as well
        raise CheckpointError(f"{megatron}: {said}: more than {tolerance:g} of it; the weights differ")
    print(said, flush=True)
    return said


@contextmanager
def alone() -> Iterator[None]:
    """Run as a job of one process, even inside a larger job."""
    world = os.environ.pop("WORLD_SIZE", None)
    try:
        ranks.initialize(Layout())
        yield
    finally:
        ranks.shutdown()
        if world is not None:
            os.environ["WORLD_SIZE"] = world


def _tokens(folder: Path, shape: MixtralShape, prompt: str) -> Tensor:
    """The prompt as token ids, [1, S]; arbitrary ids if there is no tokenizer."""
    try:
        found = tokenizer.find(folder)
        begin = [] if shape.bos_token_id is None else [shape.bos_token_id]
        ids = [*begin, *found.encode(prompt)] if found else None
    except Exception:  # a damaged tokenizer shouldn't prevent the comparison
        ids = None
    ids = ids or [(7 * place + 1) % shape.vocab_size for place in range(16)]
    return torch.tensor([[number % shape.vocab_size for number in ids]])


# --- transformers -------------------------------------------------------------------------------------------------


def whole_reference(hub: Path, shape: MixtralShape, tokens: Tensor, dtype: str | None) -> Tensor:
    """[1, S, V] by transformers' own loader and model."""
    from transformers import AutoModelForCausalLM

    found = _one_by_one(AutoModelForCausalLM.from_pretrained(hub, local_files_only=True))
    if dtype:
        found = found.to(getattr(torch, dtype))
    return found.float().eval()(tokens).logits


def _one_by_one(found: Any) -> Any:
    """Compute experts one by one, which works for every width; transformers 5 would group them."""
    if hasattr(found, "set_experts_implementation"):
        found.set_experts_implementation("eager")
    return found


def reference_by_layers(hub: Path, shape: MixtralShape, tokens: Tensor, dtype: str | None) -> Tensor:
    """The same, but each part gets its weights before it is called and loses them afterwards."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(hub, local_files_only=True)
    with torch.device("meta"):
        found = _one_by_one(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    found.model.rotary_emb = type(found.model.rotary_emb)(config=config)
    folder, names = open_model(hub, shape)
    weights, table = Weights(source=folder, dtype=dtype), _renamed(shape, names, found)
    parts = [f"model.layers.{layer}" for layer in range(shape.num_hidden_layers)]
    for part in ("model.embed_tokens", *parts, "model.norm", "lm_head"):
        _lend(found.get_submodule(part), part, weights, table)
    return found(tokens).logits


def _renamed(shape: MixtralShape, names: Names, found: torch.nn.Module) -> dict[str, list[tuple[Rows, Rows]]]:
    """transformers' parameter -> its rows in the folder, which may have other names."""
    theirs = Names.found_in(name for name, _ in found.named_parameters())
    table: dict[str, list[tuple[Rows, Rows]]] = {}
    for here, there in zip(links(shape, theirs), links(shape, names), strict=True):
        table.setdefault(here.hub.name, []).append((here.hub, there.hub))
    if shape.tie_word_embeddings:
        table["lm_head.weight"] = table["model.embed_tokens.weight"]
    return table


def _lend(part: torch.nn.Module, prefix: str, weights: Weights, table: dict[str, list[tuple[Rows, Rows]]]) -> None:
    """Have `part` filled before it is called and emptied afterwards."""

    def fill(*_: Any) -> None:
        part.to_empty(device="cpu")
        for name, parameter in part.named_parameters():
            for here, there in table[f"{prefix}.{name}"]:
                weights.read(there, parameter[here.index][here.start : here.stop])

    part.register_forward_pre_hook(fill)
    part.register_forward_hook(lambda *_: part.to("meta") and None)


# --- megatron-core ------------------------------------------------------------------------------------------------


def whole_model(folder: Path, shape: MixtralShape, tokens: Tensor, dtype: str | None) -> Tensor:
    """[1, S, V] by megatron-core's model with the weights of a folder that any layout loads."""
    built = build.build(shape, Layout(), precision="fp32", random_weights=False, fuse=False).eval()
    save_load.load_weights(built, folder)
    if dtype:
        for parameter in built.parameters():
            parameter.copy_(parameter.to(getattr(torch, dtype)))
    tokens = tokens.to(ranks.device())
    return built(tokens, _positions(tokens), None).float().cpu()


def model_by_layers(weights: Weights, shape: MixtralShape, tokens: Tensor) -> Tensor:
    """The same with a model of one layer that gets each layer's weights in turn."""
    shape_of_one = replace(shape, num_hidden_layers=1)
    built = build.build(shape_of_one, Layout(), precision="fp32", random_weights=False, fuse=False).eval()
    around, within = _shards(built)
    _fill(around, weights)
    tokens = tokens.to(ranks.device())
    hidden = built.embedding(input_ids=tokens, position_ids=_positions(tokens))
    rotary = built.rotary_pos_emb(tokens.shape[1])
    for layer in range(shape.num_hidden_layers):
        _fill(within, weights, layer)
        hidden, _ = built.decoder.layers[0](hidden, attention_mask=None, rotary_pos_emb=rotary)
    shared = built.shared_embedding_or_output_weight() if shape.tie_word_embeddings else None
    logits, _ = built.output_layer(built.decoder.final_layernorm(hidden), weight=shared)
    return logits.transpose(0, 1).float().cpu()


def _positions(tokens: Tensor) -> Tensor:
    return torch.arange(tokens.shape[1], device=tokens.device).expand(1, -1)


def _shards(built: Any) -> tuple[list[ShardedTensor], list[ShardedTensor]]:
    """A model's shards, those outside its layers and those inside."""
    wanted = save_load.weights_wanted(built)
    apply_factories(wanted)
    shards = [value for value in nested_values(wanted) if isinstance(value, ShardedTensor)]
    within = [shard for shard in shards if shard.key.startswith(tensors.LAYER)]
    return [shard for shard in shards if not shard.key.startswith(tensors.LAYER)], within


def _fill(shards: Iterable[ShardedTensor], weights: Weights, layer: int = 0) -> None:
    """Fill each shard with its rows of the whole model; `layer` is the layer to read."""
    for shard in shards:
        axes, front = megatron_axes(shard.key), shard.prepend_axis_num
        for own in product(*map(range, shard.data.shape[: axes - front])):
            plane = shard.data[own]
            offset = shard.global_offset
            index = (*offset[:front], *(o + i for o, i in zip(offset[front:axes], own, strict=True)))
            index = (layer, *index[1:]) if axes else ()
            weights.read(Rows(shard.key, index, offset[axes], offset[axes] + plane.shape[0]), plane)


# --- memory -------------------------------------------------------------------------------------------------------


def available() -> int:
    """Bytes that this process can still allocate: the least of the machine's, its control group's and the GPU's."""
    import psutil

    left = [psutil.virtual_memory().available]
    if cpu.HAVE_GPU:
        left.append(torch.cuda.mem_get_info()[0])
    return min(left + _left_in_groups())


def _left_in_groups(root: Path = Path("/sys/fs/cgroup")) -> list[int]:
    """The free memory of each control group around this process that has a limit."""
    try:
        own = next(
            line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")
        )
    except (OSError, StopIteration):
        return []
    left = []
    for folder in (root / own.strip("/"), *(root / own.strip("/")).parents):
        try:
            left.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
        except (OSError, ValueError):  # no such file above the root, "max" where there is no limit
            continue
    return left
