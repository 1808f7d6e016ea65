"""Which of Megatron's files `convert` writes: those that every layout loads, or legacy ones of one (pure)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from launcher.errors import UsageError
from launcher.planning.layout import Layout


def kind(layout: Layout, expert_tensor: int | None, to: str, values: Mapping[str, Any]) -> tuple[Layout, str]:
    """The layout to write and what its files are called in a folder's name; `UsageError` where options don't go.

    `expert_tensor` is that axis as it was asked for, None where it wasn't.
    """
    if values.get("format") != "legacy":
        if lost := [name for name in ("names", "make_vocab_size_divisible_by") if name in values]:
            raise UsageError(f"--{lost[0].replace('_', '-')}: goes with --layout legacy alone")
        return layout, to
    if to != "megatron":
        raise UsageError("--layout: legacy goes with --to megatron alone")
    if expert_tensor is None:  # upstream's own default
        layout = replace(layout, expert_tensor=layout.tensor)
    sizes = {"TP": layout.tensor, "PP": layout.pipeline, "EP": layout.expert}
    if layout.expert_tensor != layout.tensor:
        sizes["ETP"] = layout.expert_tensor
    return layout, "legacy-" + "".join(f"{axis}{size}" for axis, size in sizes.items())
