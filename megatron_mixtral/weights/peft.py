"""Adapters in PEFT's layout: adapter_model.safetensors with PEFT's names, and adapter_config.json.

Numbers are copied unchanged. Experts have transformers 5's names, and PEFT adapts their parameters by
`target_parameters`: two on one module, of which the second wraps the first.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import lora as adapters
from megatron_mixtral.weights.copying import RowRun, Target, read_rows
from megatron_mixtral.weights.lora import Lora
from megatron_mixtral.weights.tensors import ITEMSIZE, Rows
from megatron_mixtral.weights.torch_dist import TorchDistFolder

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EXPERTS = {"gate_up_proj": "mlp.experts.base_layer", "down_proj": "mlp.experts"}


class PeftRows:
    """An adapter checkpoint whose experts' lora_B are side by side, with the expert as the innermost axis."""

    def __init__(self, source: TorchDistFolder, experts: int) -> None:
        self.source, self.experts = source, experts

    def dtype(self, name: str) -> str:
        return self.source.dtype(name)

    def row_bytes(self, name: str) -> int:
        return self.source.row_bytes(name) * (self.experts if _is_side_by_side(name) else 1)

    def read(self, rows: Rows, out: memoryview) -> None:
        if not _is_side_by_side(rows.name):
            return self.source.read(rows, out)
        import numpy as np

        item = np.dtype(f"u{ITEMSIZE[self.dtype(rows.name)]}")
        whole = np.frombuffer(out, item).reshape(len(rows), -1, self.experts)
        for expert in range(self.experts):
            data = read_rows(self.source, Rows(rows.name, (*rows.index, expert), rows.start, rows.stop))
            whole[:, :, expert] = np.frombuffer(data, item).reshape(len(rows), -1)
        return None

    def file_of(self, rows: Rows) -> Path:
        index = (*rows.index, 0) if _is_side_by_side(rows.name) else rows.index
        return self.source.file_of(Rows(rows.name, index, rows.start, rows.stop))


def _is_side_by_side(name: str) -> bool:
    return name.startswith(adapters.OF_EXPERTS) and name.endswith("lora_B")


def targets(shape: MixtralShape, lora: Lora, source: PeftRows, dtype: str | None) -> Iterator[Target]:
    """Every tensor that PEFT reads."""
    known = adapters.pairs(shape, lora)
    for layer in range(shape.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{layer}"
        for name, pair in known.items():
            place = f"{prefix}.{EXPERTS.get(name, f'self_attn.{name}')}"
            count = shape.num_local_experts if name in EXPERTS else 1
            index: list[tuple[int, ...]] = [(layer, e) for e in range(count)] if name in EXPERTS else [(layer,)]
            a, b = pair.side("lora_A"), pair.side("lora_B")
            of_a = [Rows(a, i, 0, lora.rank) for i in index]
            yield _target(f"{place}.lora_A.weight", (count * lora.rank, pair.into), of_a, dtype or source.dtype(a))
            of_b = [Rows(b, (layer,), 0, pair.out)]
            yield _target(f"{place}.lora_B.weight", (pair.out, count * lora.rank), of_b, dtype or source.dtype(b))


def _target(name: str, sizes: tuple[int, int], rows: list[Rows], dtype: str) -> Target:
    return Target(name, (0, 0), sizes, dtype, tuple(RowRun(part, name) for part in rows))


def write_config(folder: Path, lora: Lora, base: str) -> None:
    """`adapter_config.json`; `base` is the model in the hub's layout that the adapters belong to."""
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(ATTENTION),
        "target_parameters": [f"mlp.experts.{name}" for name in EXPERTS] if lora.experts else None,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
