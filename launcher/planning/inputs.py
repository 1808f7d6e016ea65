"""What a plan needs from the cluster's file system: the shape of its model, and that its inputs are there.

The only part of planning that reads files; it writes none.
"""

import contextlib
import json
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from launcher.cluster import paths as places
from launcher.cluster.profile import ClusterProfile
from launcher.errors import Fault, UsageError
from launcher.host import ssh
from launcher.planning import uploads
from launcher.planning.plan import Input, JobPlan
from megatron_mixtral.spec.options import SpecError
from megatron_mixtral.spec.shape import MixtralShape, published


def shape(profile: ClusterProfile, model: str) -> MixtralShape | None:
    """The shape that a `config.json` of `model` tells, where this machine or the login node sees one."""
    folders = places.model_folders(profile, model)
    texts = _texts_there(profile.login_node, folders) if profile.login_node else _texts_here(folders)
    for text in texts:
        # Not a model's: the job itself says what is wrong.
        with contextlib.suppress(SpecError, ValueError, TypeError, AttributeError, RecursionError):
            return MixtralShape.from_hf(json.loads(text))
    return None


def servable(profile: ClusterProfile, model: str) -> str:
    """`model`, or the folder that it was downloaded into where it hasn't been converted: either can be served."""
    if profile.login_node or "/" not in model or places.is_path(model):
        return model
    downloaded = places.hub_folder(profile, model)
    converted = Path(places.weights(profile, model)).exists()
    return downloaded if Path(downloaded).is_dir() and not converted else model


def _texts_here(folders: Iterable[str]) -> Iterator[str]:
    """Every `config.json` that may tell the shape, the likeliest first."""
    for folder in map(Path, folders):
        steps = sorted([*folder.glob("iter_*"), *folder.glob("checkpoints/iter_*")])[-1:]
        for place in (folder, folder / "release", *steps):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                yield (place / "config.json").read_text()


def _texts_there(login: ssh.Login, folders: Sequence[str]) -> Iterator[str]:
    """The same in one round trip. Without an answer the shape stays unknown: planning needs no network."""
    if published(folders[0]):
        return  # its name tells
    lines = []
    for folder in map(shlex.quote, folders):
        newest = f"$(ls -d {folder}/iter_* {folder}/checkpoints/iter_* 2>/dev/null | tail -n 1)"
        candidates = f'{folder} {folder}/release "{newest}"'
        lines.append(
            f'for d in {candidates}; do [ ! -r "$d/config.json" ] || cat "$d/config.json"; printf "\\f"; done'
        )
    try:
        yield from ssh.run(login, "\n".join(lines)).out.split("\f")
    except Fault as fault:
        print(f"note: {fault}\n  the model's shape isn't known and goes unchecked", file=sys.stderr)


def missing(plan: JobPlan) -> list[Input]:
    """Inputs of `plan` that aren't there, where the job will run."""
    if login := plan.profile.login_node:
        asked = [given for given in plan.inputs if uploads.source(plan.profile, given.path) is None]
        tests = [f"[ -e {shlex.quote(given.path)} ]; echo $?" for given in asked]
        answers = ssh.run(login, "\n".join(tests)).out.split() if tests else []
        return [given for given, answer in zip(asked, answers, strict=True) if answer != "0"]
    return [given for given in plan.inputs if not Path(given.path).exists()]


def is_converted(profile: ClusterProfile, folder: str) -> bool:
    """Whether `folder` holds finished weights in Megatron's layout, or a run that has some."""
    marks = ("mixlaunch.json", "release/mixlaunch.json", "checkpoints/latest_checkpointed_iteration.txt")
    paths = [f"{folder}/{mark}" for mark in marks]
    if login := profile.login_node:
        return ssh.run(login, " || ".join(f"[ -e {shlex.quote(path)} ]" for path in paths)).code == 0
    return any(Path(path).exists() for path in paths)


def is_downloaded(profile: ClusterProfile, folder: str) -> bool:
    """Whether `folder` holds all of a model in the hub's layout. Of a login node's folder it isn't known."""
    if profile.login_node or not Path(folder, "config.json").exists():
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
    """`UsageError` naming every input that isn't there and how one gets it."""
    login = plan.profile.login_node
    where = f" on {login.host}" if login else ""
    if absent := missing(plan):
        lines = (f"{i.what}: {i.path} doesn't exist{where}\n  {i.hint}".rstrip() for i in absent)
        raise UsageError("\n".join(lines))


def require_file_system(plan: JobPlan) -> None:
    """`UsageError` unless this machine has the cluster's shared folders: a laptop's disk isn't Lustre."""
    if plan.profile.is_local or plan.profile.login_node:
        return
    for path in plan.outputs:
        if not Path(path).parent.exists():
            raise UsageError(
                f"{Path(path).parent} isn't on this machine; run this on a login node of {plan.profile.name}, "
                "or give --output"
            )
