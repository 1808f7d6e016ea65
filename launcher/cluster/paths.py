"""Where a job's parts lie unless a path says otherwise: models, weights, data, runs follow from a profile (pure).

A model is a path, a repository of the hub (OWNER/NAME), or the name of a run.
"""

import os.path

from launcher.cluster.profile import ClusterProfile
from launcher.cluster.yaml_layers import REFERENCE
from launcher.common import quoting
from launcher.errors import UsageError
from megatron_mixtral.spec.shape import MODEL


def model_folders(profile: ClusterProfile, model: str) -> tuple[str, ...]:
    """Where `model` may lie: in the hub's layout, and in Megatron's or as a run."""
    return tuple(dict.fromkeys((hub_folder(profile, model), weights(profile, model))))


def hint(command: str, model: str) -> str:
    """What makes a repository's folder; a path's or a run's is the user's own affair."""
    if is_path(model) or "/" not in model:
        return ""
    verb, *option = command.split()
    if model == MODEL:
        return f"`mixlaunch {verb}` makes it"
    return f"`mixlaunch {' '.join([verb, *option, model])}` makes it; a folder here is written ./{model}"


def is_path(model: str) -> bool:
    return model.startswith(("/", ".", "~"))


def path(value: str, option: str) -> str:
    """An absolute path; `UsageError` for one that holds what only a shell would expand."""
    quoting.checked(value, option)
    if not value:
        raise UsageError(f"{option}: empty; give a path")
    if variable := REFERENCE.search(value):
        raise UsageError(
            f"{option}: {quoting.shown(value)} holds {variable[0]}, which no shell will expand any more"
        )
    return quoting.path(os.path.normpath(os.path.join(os.getcwd(), os.path.expanduser(value))), option)


def hub_folder(profile: ClusterProfile, model: str) -> str:
    """`model` in the hub's layout: a path as it is, a repository by its last name in the models folder."""
    if is_path(model):
        return path(model, "--model")
    return os.path.join(profile.paths.models, _basename(model))


def weights(profile: ClusterProfile, model: str, option: str = "--model") -> str:
    """`model` in Megatron's layout: a path as it is, a repository's conversion, or a run by its name."""
    if is_path(model):
        return path(model, option)
    if "/" in model:
        return os.path.join(profile.paths.models, f"{_basename(model, option)}-megatron")
    return os.path.join(profile.paths.runs, quoting.name(model, option))


def _basename(model: str, option: str = "--model") -> str:
    owner, _, base = model.rpartition("/")
    if owner:
        quoting.name(owner, option)
    return quoting.name(base, option)


def converted(profile: ClusterProfile, model: str, kind: str) -> str:
    """Where `model` in the layout of that kind goes: its name with that of the layout behind it."""
    base = os.path.basename(path(model, "--model")) if is_path(model) else _basename(model)
    return os.path.join(profile.paths.models, f"{base}-{kind}")


def data_prefix(profile: ClusterProfile) -> str:
    return os.path.join(profile.paths.data, "finetune")
