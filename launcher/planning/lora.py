"""The layout that `finetune --lora` has unless told (pure)."""

from collections.abc import Callable
from dataclasses import replace

from launcher.errors import LayoutError
from launcher.planning import fit
from launcher.planning.fit import Request
from megatron_mixtral.spec.layout import Layout

# One node of 8: the base spread by its experts, its attention cut only as far as the rest wants the room.
LAYOUTS = tuple(Layout(tensor=size, expert=8) for size in (1, 2, 4, 8))


def layout(request: Request, over: Callable[[Layout], Layout]) -> Layout:
    """The first of LAYOUTS, with the typed axes in place, that fits a GPU's memory; if none fits, the first."""
    for candidate in map(over, LAYOUTS):
        try:
            if not fit.study(replace(request, layout=candidate)).shortage:
                return candidate
        except LayoutError:
            continue
    return over(LAYOUTS[0])
