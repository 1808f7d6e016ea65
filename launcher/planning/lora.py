"""What `finetune --lora` asks for: options held against each other, and the layout it has unless told (pure)."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from launcher.errors import LayoutError, UsageError
from launcher.planning import fit
from launcher.planning.fit import Request
from launcher.planning.layout import Layout

# One node of 8: the base spread by its experts, its attention cut only as far as the rest wants the room.
LAYOUTS = tuple(Layout(tensor=size, expert=8) for size in (1, 2, 4, 8))


def checked(chosen: dict[str, Any]) -> dict[str, Any]:
    """`chosen`, finetune's settings, unless they say of adapters what can't be."""
    if not chosen.get("lora") and (lost := [name for name in chosen if name.startswith("lora_")]):
        raise UsageError(f"--{lost[0].replace('_', '-')}: goes with --lora RANK alone")
    if chosen.get("lora_dropout") == 1:
        raise UsageError("--lora-dropout: 1 leaves nothing to learn from; must be below 1")
    if chosen.get("lora_experts") and chosen.get("lora_dropout"):
        raise UsageError("--lora-dropout: adapters of experts have none, in PEFT neither; leave out --lora-experts")
    return chosen


def layout(request: Request, over: Callable[[Layout], Layout]) -> Layout:
    """The first of LAYOUTS, `over` which lies what was typed, that a GPU's memory has room for; else the first."""
    for candidate in map(over, LAYOUTS):
        try:
            if not fit.study(replace(request, layout=candidate)).shortage:
                return candidate
        except LayoutError:
            continue
    return over(LAYOUTS[0])
