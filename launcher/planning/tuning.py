"""Finetune's settings held against each other, so that what can't be is told before a queue is waited in (pure)."""

from typing import Any

from launcher.errors import UsageError
from launcher.planning import settings
from launcher.planning.layout import Layout, Shape


def checked(chosen: dict[str, Any], shape: Shape | None) -> dict[str, Any]:
    """`chosen`, finetune's settings, unless one of them says nothing without another, or against it."""
    told = settings.complete("finetune", chosen)
    if told["min_lr"] > told["lr"]:
        raise UsageError(f"--lr: {told['lr']:g} is below --min-lr, {told['min_lr']:g}, where it ends")
    for name in ("pad_to_capacity", "drop_policy"):
        if chosen.get(name, "probs") not in (False, "probs") and not chosen.get("capacity_factor"):
            raise UsageError(f"{_option(name)}: experts have no capacity unless --capacity-factor gives them one")
    factor, most = chosen.get("capacity_factor", 0), shape.experts / shape.experts_a_token if shape else 0
    if shape and chosen.get("pad_to_capacity") and factor > most:
        raise UsageError(
            f"--capacity-factor: {factor:g}, but with --pad-to-capacity at most {shape.experts} experts / "
            f"{shape.experts_a_token} a token = {most:g}, where each gets every token"
        )
    fp8 = chosen.get("fp8", "none") != "none"
    if "fp8_recipe" in chosen and not fp8:
        raise UsageError("--fp8-recipe: goes with --fp8 alone")
    if fp8 and chosen.get("precision") == "fp32":
        raise UsageError("--fp8: goes with --precision bf16, not fp32")
    if fp8 and chosen.get("lora"):
        raise UsageError("--fp8: adapters are computed by our own layers, which have none; leave out --lora")
    return chosen


def check_packing(chosen: dict[str, Any], layout: Layout) -> None:
    """`UsageError` for sequences of several documents whose ends context parallelism would not know."""
    packing, context = chosen.get("packing", "stream"), layout.context
    if context > 1 and packing != "stream":
        raise UsageError(f"--packing: {packing}, but --cp {context} splits whole sequences; use stream, or --cp 1")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
