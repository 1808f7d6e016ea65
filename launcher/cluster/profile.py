"""A cluster's profile: what the cluster is, and how its jobs are requested. YAML becomes a validated, frozen model.

Every mistake in a profile is a `ProfileError` that names the file, the line and the nearest valid key.
"""

import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from launcher import templates
from launcher.cluster import catalog, yaml_layers
from launcher.cluster.containers import RUNTIMES
from launcher.cluster.sections import Binding, Container, Login, Node, Part, Paths, Serve, Text, as_value_error
from launcher.cluster.yaml_layers import Document, Location
from launcher.common import quoting, words
from launcher.errors import ProfileError
from launcher.host.base import Host
from launcher.host.local import Local
from launcher.host.login_node import LoginNode
from launcher.slurm import hostlist, sbatch_options

TIME = re.compile(r"\d{1,8}|\d{1,8}:\d\d(:\d\d)?|\d{1,8}-\d\d?(:\d\d(:\d\d)?)?", re.ASCII)
# Options that the launcher sets for every job; `extra` adds to them and never replaces them.
OWNED = frozenset(
    (
        *("job-name", "account", "partition", "qos", "reservation", "constraint", "comment", "time", "exclusive"),
        *("nodes", "ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
        *("cpus-per-task", "cpus-per-gpu", "tres-per-task", "gres", "gpus", "gpus-per-node", "gpus-per-task"),
        *("gpus-per-socket", "mem", "mem-per-cpu", "mem-per-gpu", "signal", "requeue", "no-requeue", "open-mode"),
        *("output", "error", "input", "chdir", "wrap", "array", "parsable", "quiet", "test-only", "wait"),
        *("clusters", "export", "export-file", "nodelist", "nodefile", "uid", "gid"),
    )
)
CALLED = {  # names that an administrator gives, and features put together
    "constraint": (re.compile(r"[\w\[(][\w\[\]().&|*,:=+-]*"), "a100&ib or [rack1|rack2]"),
    "others": (re.compile(r"\w[\w.@:/+-]*(,\w[\w.@:/+-]*)*"), "nlp or gpu,debug"),
}
# Variables by which the script gives every rank its number.
OF_RANKS = (
    *("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"),
    *("SLURM_JOB_ID", "MIXLAUNCH_RUN", "MIXLAUNCH_LOGS", "MIXLAUNCH_ATTEMPT"),
)
KIND = re.compile(r"(function-\w+|literal)\[")  # pydantic's names for the alternatives of a union, after a key
OF_BASH = ("UID", "EUID", "PPID", "SHELLOPTS", "BASHOPTS", "BASH_VERSINFO")


class ClusterProfile(Part):
    """One cluster. The field names are the keys of the YAML file."""

    name: str = Field(description="the file's name unless given")
    description: str = Field(default="", description="for the list of clusters")
    scheduler: Literal["slurm", "local"] = Field(description="local: processes of this machine")
    account: Text | None = Field(default=None, description="sbatch --account")
    partition: Text | None = Field(default=None, description="sbatch --partition; the default one unless given")
    qos: Text | None = Field(default=None, description="sbatch --qos")
    reservation: Text | None = Field(default=None, description="sbatch --reservation")
    constraint: Text | None = Field(default=None, description="sbatch --constraint: features that nodes must have")
    comment: Text | None = Field(default=None, description="sbatch --comment")
    time: Text = Field(default="04:00:00", description="limit of a job: minutes, HH:MM:SS or D-HH:MM:SS")
    exclusive: bool = Field(default=False, description="whole nodes, with all their memory")
    gpu_request: Literal["gres", "gpus-per-node", "gpus-per-task", "none"] = Field(
        default="gpus-per-node", description="how GPUs are requested; none where a whole node comes with its GPUs"
    )
    node: Node = Field(default_factory=Node)
    binding: Binding = Field(default_factory=Binding)
    container: Container = Field(default_factory=Container)
    environment: dict[str, Text] = Field(default={}, description="exported to every rank")
    secrets: tuple[str, ...] = Field(
        default=(), description="variables of your environment whose values only go to the run's secrets.env"
    )
    python: str = Field(
        default="python", description="the Python that has megatron_mixtral, inside the container if there is one"
    )
    paths: Paths
    slurm_version: Text = Field(
        default=sbatch_options.OLDEST, description="version of Slurm; it decides which sbatch options exist"
    )
    slurm_conf: str | None = Field(default=None, description="SLURM_CONF for every call of Slurm's commands")
    signal_lead: int = Field(
        default=300,
        ge=10,
        le=65535,
        description="seconds between the warning and the time limit; must be longer than a save",
    )
    health_check: bool = Field(
        default=False, description="look at every node before the ranks start; come back without one that isn't fit"
    )
    serve: Serve = Field(default_factory=Serve)
    login: Login = Field(default_factory=Login)
    templates: dict[str, str] = Field(default={}, description="parts of the script to replace: FRAGMENT: PATH")
    extra: dict[str, Text | Literal[True]] = Field(
        default={}, description="other sbatch options, NAME: VALUE or NAME: true"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return as_value_error(quoting.name, value)

    @field_validator("account", "partition", "qos", "reservation", "constraint", "comment")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        if value is not None:
            as_value_error(quoting.directive, value)
        return value

    @field_validator("account", "partition", "qos", "reservation", "constraint")
    @classmethod
    def _called(cls, value: str | None, info: ValidationInfo) -> str | None:
        pattern, example = CALLED["constraint" if info.field_name == "constraint" else "others"]
        if value is not None and not pattern.fullmatch(value):
            raise ValueError(f"{quoting.shown(value)} isn't one as Slurm has them, such as {example}")
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        return time_limit(value)

    @field_validator("environment")
    @classmethod
    def _variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            _at("environment", name, _variable, name)
        return environment

    @field_validator("secrets")
    @classmethod
    def _secrets(cls, secrets: tuple[str, ...]) -> tuple[str, ...]:
        for name in secrets:
            _variable(name)
        return tuple(dict.fromkeys(secrets))

    @field_validator("python", "slurm_conf")
    @classmethod
    def _program(cls, value: str | None) -> str | None:
        if value is not None and (not value or value.startswith("-")):
            raise ValueError(f"{value!r} isn't a path")
        return as_value_error(quoting.path, os.path.expanduser(value)) if value else value

    @field_validator("templates")
    @classmethod
    def _parts(cls, templates: dict[str, str]) -> dict[str, str]:
        for name, path in templates.items():
            _at("templates", name, _part, name, path)
        return templates

    @field_validator("extra")
    @classmethod
    def _extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for option, value in extra.items():
            _at("extra", option, _option, option, value)
        return extra

    @field_validator("slurm_version")
    @classmethod
    def _version(cls, version: str) -> str:
        if not re.fullmatch(r"\d\d\.\d\d(\.\d+)?", version) or sbatch_options.number(version) < (22, 5):
            raise ValueError(f"{version!r} isn't a version from {sbatch_options.OLDEST} on, such as '23.11'")
        return version

    @model_validator(mode="after")
    def _together(self) -> "ClusterProfile":
        known = sbatch_options.known_options(self.slurm_version)
        for option in self.extra:
            if option not in known:
                near = words.nearest(option, known - OWNED)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise _mistake_at(
                    f"extra: sbatch of Slurm {self.slurm_version} has no --{option}{hint}", "extra", option
                )
        if twice := set(self.secrets) & set(self.environment):
            name = min(twice)
            raise _mistake_at(f"{name} is a secret, but environment.{name} would show it", "environment", name)
        if 0 < len(self.binding.numa) < self.node.gpus:  # more is fine: nodes of which a part is used
            message = f"{len(self.binding.numa)} NUMA nodes for {self.node.gpus} GPUs (node.gpus); give one a GPU"
            raise _mistake_at(f"binding.numa: {message}", "binding", "numa")
        self._check_local()
        return self

    def _check_local(self) -> None:
        """Refuse what only Slurm has."""
        if not self.is_local:
            return
        if self.login.host:
            raise _mistake_at("login.host: jobs of this cluster are processes of this machine", "login", "host")
        if self.in_container and RUNTIMES[self.container.runtime].srun_option:
            message = f"container.runtime: {self.container.runtime} is a part of Slurm, and this cluster has none"
            raise _mistake_at(message, "container", "runtime")
        if self.binding.of_srun:
            raise _mistake_at("binding: these are options of srun, and this cluster has no Slurm", "binding")

    @property
    def is_local(self) -> bool:
        """Whether jobs run as processes of this machine."""
        return self.scheduler == "local"

    @property
    def in_container(self) -> bool:
        """Whether ranks run in a container."""
        return self.container.runtime != "none"

    @property
    def excluded(self) -> set[str]:
        """Nodes that no job of this profile gets."""
        return set(hostlist.expand(str(self.extra.get("exclude", ""))))

    @property
    def host(self) -> Host:
        """Where Slurm's commands run and the shared folders are: this machine, or the login node to go through."""
        node = self.login.node
        return LoginNode(node, self.slurm_conf) if node else Local(self.slurm_conf)

    @property
    def runs_here(self) -> Path:
        """The run directories on this machine: the shared folder, or its copies."""
        return self.host.place(Path(self.paths.runs))


def time_limit(value: str) -> str:
    """`value` if Slurm reads it as a time limit; `ValueError` otherwise."""
    if not TIME.fullmatch(value):
        raise ValueError(f"{quoting.shown(value)} isn't a time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    return value


def _option(option: str, value: str | bool) -> None:
    """`ValueError` unless a profile may add this option to every job's."""
    if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
        raise ValueError(f"{option!r} isn't a long sbatch option without its dashes, such as mail-type")
    if option in OWNED:
        raise ValueError(f"{option!r} is set by the launcher; use the profile's keys")
    if isinstance(value, str):
        as_value_error(quoting.directive, value)
    if option == "exclude":
        if not isinstance(value, str):
            raise ValueError("'exclude' needs nodes, such as gpu[01-04]")
        as_value_error(lambda hosts, _: hostlist.expand(hosts), value)


def _part(name: str, path: str) -> None:
    """`ValueError` unless a script has such a part and `path` may be one."""
    as_value_error(lambda value, _: templates.known(value), name)
    if not path:
        raise ValueError(f"{name}: give a path")
    as_value_error(quoting.path, path)


def _at(section: str, key: str, check: Callable[..., None], *values: Any) -> None:
    """`check(*values)`, with its error reported at this key and not at the section."""
    try:
        check(*values)
    except ValueError as error:
        raise _mistake_at(f"{section}: {error}", section, key) from None


def _variable(name: str) -> None:
    """`ValueError` unless a profile may give the variable `name` a value."""
    as_value_error(quoting.variable, name)
    if name in OF_RANKS:
        raise ValueError(f"{name} is set by the launcher: it gives a rank its number")
    if name in OF_BASH:
        raise ValueError(f"{name} is set by bash, and can't have another value")


def load(cluster: str | None = None, overrides: Sequence[str] = ()) -> ClusterProfile:
    """The profile named by `cluster`, else by $MIXLAUNCH_CLUSTER, else `local`, with KEY=VALUEs over it."""
    return read(catalog.find(catalog.default() if cluster is None else cluster), overrides)


def read(path: Path, overrides: Sequence[str] = ()) -> ClusterProfile:
    """One file -> profile, its name the file's unless it says another; `ProfileError` names line and key."""
    document = yaml_layers.read(path, overrides)
    values = {"name": path.stem, **document.values}
    if isinstance(values.get("templates"), dict):
        values["templates"] = dict(_template_paths(document))
    try:
        return ClusterProfile.model_validate(values)
    except ValidationError as error:
        raise ProfileError(_explain(document, error)) from error


def _template_paths(document: Document) -> Iterator[tuple[str, Any]]:
    """A relative path starts at the folder of the file that holds it, which may be a parent's."""
    for name, path in document.values["templates"].items():
        folder = document.origin(("templates", name)).folder
        yield name, os.path.normpath(folder / os.path.expanduser(path)) if isinstance(path, str) and path else path


def _mistake_at(message: str, *location: str) -> PydanticCustomError:
    """An error of several keys together; pydantic doesn't give it a place."""
    return PydanticCustomError("at", "{message}", {"message": message, "location": location})


def _explain(document: Document, error: ValidationError) -> str:
    """One line per mistake, in the words of this module rather than pydantic's."""
    lines: dict[Location, str] = {}  # the first error of each key: a union has one for every type
    for found in error.errors(include_url=False):
        found["loc"] = tuple(part for part in found["loc"] if not KIND.match(str(part)))
        location = found["ctx"]["location"] if found["type"] == "at" else found["loc"]
        lines.setdefault(location, str(document.error(location, _mistake(found))))
    return "\n".join(lines.values())


def _mistake(error: Any) -> str:
    location, kind = error["loc"], error["type"]
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(location)}Valid: {', '.join(keys_at(location[:-1]))}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "at":
        return str(error["ctx"]["message"])
    message = error["msg"].removeprefix("Value error, ")
    given = "" if kind == "value_error" else f" (got {error['input']!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


def _nearest(location: Location) -> str:
    """Proposes the valid key that was probably meant, in this section or in another."""
    key = str(location[-1])
    nested = {leaf: f"{part}.{leaf}" for part in keys_at(()) for leaf in keys_at((part,))}
    near = words.nearest(key, keys_at(location[:-1]), cutoff=0.5)
    if key in nested and (len(location) == 1 or not near):
        near = [nested[key]]
    return f"did you mean {near[0]!r}? " if near else ""


@functools.cache
def keys_at(location: Location) -> tuple[str, ...]:
    """The valid keys of the section at `location`; none if that isn't a section."""
    model: Any = ClusterProfile
    for part in location:
        model = model.model_fields[str(part)].annotation
        if not (isinstance(model, type) and issubclass(model, Part)):
            return ()
    return tuple(model.model_fields)
