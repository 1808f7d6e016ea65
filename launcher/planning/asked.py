"""What settings ask of a GPU, in the words of `fit`, and the answer: an outlook, or what would fit instead (pure).

Defaults are the settings' own, so that what isn't given counts as well.
"""

from collections.abc import Mapping
from typing import Any

from launcher.errors import LayoutError
from launcher.planning import fit, settings, suggest
from launcher.planning.fit import Batch, Outlook, Request
from launcher.planning.layout import Shape
from launcher.planning.memory import Serving


def outlook(request: Request) -> Outlook:
    """What `request` comes to; the refusal of what can't be names the nearest layouts that can."""
    try:
        return fit.study(request)
    except LayoutError as error:
        raise suggest.explained(error, request) from None


def batch(chosen: Mapping[str, Any]) -> Batch:
    """Of finetune: what decides memory and time."""
    values = settings.complete("finetune", chosen)
    return Batch(
        sequence=values["sequence_length"],
        micro_batch=values["micro_batch"],
        global_batch=values["global_batch"],
        precision=values["precision"],
        recompute=values["recompute"],
        lora=values["lora"],
        lora_experts=values["lora_experts"],
        first_stage_layers=values["first_stage_layers"],
        last_stage_layers=values["last_stage_layers"],
        virtual_pipeline=values["virtual_pipeline"],
    )


def serving(chosen: Mapping[str, Any], shape: Shape | None) -> Serving:
    """Of serve: what it holds at once. A model whose context is shorter than the default serves its context."""
    values = settings.complete("serve", chosen)
    if "max_tokens" not in chosen and shape:
        values["max_tokens"] = min(values["max_tokens"], shape.positions)
    return Serving(
        requests=values["max_batch"],
        tokens=values["max_tokens"],
        precision=values["precision"],
        fp8_experts=values["fp8_experts"],
    )
