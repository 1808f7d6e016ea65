"""What a plan needs from this machine's file system: the shape of its model, and that its inputs are there.

The only part of planning that reads files; it writes none.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import places
from launcher.errors import UsageError
from launcher.layout import Shape
from launcher.profile import ClusterProfile

if TYPE_CHECKING:
    from launcher.jobs import Input, JobPlan


def shape(profile: ClusterProfile, model: str) -> Shape | None:
    """The shape that a `config.json` of `model` tells, if this machine sees one."""
    for folder in map(Path, places.model_folders(profile, model)):
        steps = sorted([*folder.glob("iter_*"), *folder.glob("checkpoints/iter_*")])[-1:]
        for place in (folder, folder / "release", *steps):
            try:
                return _shape(json.loads((place / "config.json").read_text()))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # absent here or not a model's: the job itself says what is wrong with it
    return None


def _shape(config: dict[str, Any]) -> Shape:
    return Shape(
        layers=int(config["num_hidden_layers"]),
        experts=int(config["num_local_experts"]),
        heads=int(config["num_attention_heads"]),
        query_groups=int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        expert_width=int(config["intermediate_size"]),
    )


def missing(plan: "JobPlan") -> list["Input"]:
    """Inputs of `plan` that aren't there."""
    return [given for given in plan.inputs if not Path(given.path).exists()]


def require(plan: "JobPlan") -> None:
    """`UsageError` naming every input that isn't there and how one gets it."""
    if absent := missing(plan):
        lines = (f"{i.what}: {i.path} doesn't exist\n  {i.hint}".rstrip() for i in absent)
        raise UsageError("\n".join(lines))


def require_file_system(plan: "JobPlan") -> None:
    """`UsageError` unless this machine has the cluster's shared folders: a laptop's disk isn't Lustre."""
    if plan.profile.is_local:
        return
    for path in plan.outputs:
        if not Path(path).parent.exists():
            raise UsageError(
                f"{Path(path).parent} isn't on this machine; run this on a login node of {plan.profile.name}, "
                "or give --output"
            )
