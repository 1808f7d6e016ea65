"""What a plan asks of the cluster's file system: the model's shape, and whether the inputs exist.

The only part of planning that reads files; it writes none.
"""

import contextlib
import json
import os
from pathlib import Path

from launcher.cluster import paths as places
from launcher.cluster.profile import ClusterProfile
from launcher.common import printable
from launcher.errors import Fault, UsageError
from launcher.planning import uploads
from launcher.planning.plan import Input, JobPlan
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.options import SpecError
from megatron_mixtral.spec.shape import MixtralShape, published

# Where a model's shape is told, the likeliest place first; of checkpoints by the newest.
CONFIGS = ("config.json", "release/config.json", "iter_*/config.json", "checkpoints/iter_*/config.json")


def shape(profile: ClusterProfile, model: str) -> MixtralShape | None:
    """The shape that a `config.json` of `model` tells, where this machine or the login node sees one."""
    folders = places.model_folders(profile, model)
    if published(folders[0]) and not any(profile.host.known(folders)):
        return None  # its name tells, and planning needs no network
    try:
        for text in profile.host.texts(folders, CONFIGS):
            # This isn't a model's configuration; the job itself will say what is wrong.
            with contextlib.suppress(SpecError, ValueError, TypeError, AttributeError, RecursionError):
                return MixtralShape.from_hf(json.loads(text))
    except Fault as fault:
        printable.out(f"note: {fault}\n  the model's shape isn't known and goes unchecked", err=True)
    return None


def servable(profile: ClusterProfile, model: str) -> str:
    """`model`, or its download if it isn't converted: both can be served."""
    if "/" not in model or places.is_path(model):
        return model
    downloaded, converted = places.hub_folder(profile, model), places.weights(profile, model)
    return downloaded if profile.host.known([downloaded, converted]) == [True, False] else model


def missing(plan: JobPlan) -> list[Input]:
    """Inputs of `plan` that aren't there, where the job will run."""
    asked = [given for given in plan.inputs if uploads.source(plan.profile, given.path) is None]
    there = plan.profile.host.exist([given.path for given in asked])
    return [given for given, found in zip(asked, there, strict=True) if not found]


def is_converted(profile: ClusterProfile, folder: str) -> bool:
    """Whether `folder` holds finished weights in Megatron's layout, or a run that has some."""
    marks = (rundir.MARKER, f"release/{rundir.MARKER}", f"{rundir.CHECKPOINTS}/{rundir.LATEST}")
    return any(profile.host.exist([f"{folder}/{mark}" for mark in marks]))


def is_downloaded(profile: ClusterProfile, folder: str) -> bool:
    """Whether `folder` holds a whole model in the hub's layout; unknown for a folder behind a login node."""
    if profile.host.known([f"{folder}/config.json"]) != [True]:
        return False
    try:
        index = json.loads(Path(folder, "model.safetensors.index.json").read_text())
        files = {str(name) for name in index["weight_map"].values()}
    except FileNotFoundError:
        files = {"model.safetensors"}
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return all(Path(folder, name).exists() for name in files)


def require(plan: JobPlan) -> None:
    """`UsageError` naming every missing input, and how to get it."""
    name = plan.profile.host.name
    where = f" on {name}" if name else ""
    if absent := missing(plan):
        lines = (f"{i.what}: {i.path} doesn't exist{where}\n  {i.hint}".rstrip() for i in absent)
        raise UsageError("\n".join(lines))


def require_file_system(plan: JobPlan) -> None:
    """`UsageError` unless this machine has the cluster's shared folders; a laptop doesn't."""
    folders = [os.path.dirname(path) for path in plan.outputs]
    seen = zip(folders, plan.profile.host.known(folders), strict=True)
    absent = [folder for folder, there in seen if there is False]
    if absent and not plan.profile.is_local:
        raise UsageError(
            f"{absent[0]} isn't on this machine; run this on a login node of {plan.profile.name}, or give --output"
        )
