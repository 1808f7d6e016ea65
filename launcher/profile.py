"""What one cluster is and how its jobs must be asked for: YAML into a validated, frozen model.

Everything a user can get wrong here is a `ProfileError` that names the file, the line and the nearest valid key.
"""

import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from launcher import capabilities, quoting
from launcher.errors import ProfileError, UsageError

DEFAULT = "local"
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d\d?(:\d\d(:\d\d)?)?")
REFERENCE = re.compile(r"\$(?:\{(?P<braced>[A-Za-z_]\w*)\}|(?P<plain>[A-Za-z_]\w*))")
# What the launcher itself decides for every job; `extra` adds to these and never replaces them.
OWNED = frozenset(
    (
        *("job-name", "account", "partition", "qos", "reservation", "constraint", "comment", "time", "exclusive"),
        *("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus", "gpus-per-node", "gpus-per-task", "gres"),
        *("mem", "signal", "requeue", "no-requeue", "open-mode", "output", "error", "chdir", "wrap", "array"),
        *("parsable", "test-only", "wait", "export", "export-file", "nodelist", "uid", "gid"),
    )
)


def _text(value: Any) -> Any:
    """Numbers are fine where text is meant; booleans aren't: 1, true and True differ in an environment."""
    if isinstance(value, bool):
        raise ValueError(f"write {str(value).lower()!r} or 1 in quotes, as the variable should hold it")
    return str(value) if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_text)]


class Part(BaseModel):
    """Base of every section: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Node(Part):
    """One node's shape. `gpus: 0` means that ranks run on processors and any number of them fits."""

    gpus: int = Field(default=0, ge=0, description="GPUs a node")
    cpus: int | None = Field(default=None, ge=1, description="cores a node")
    memory_gb: int | None = Field(
        default=None, ge=1, description="memory a node, GB; asked for unless nodes are exclusive"
    )
    gpu_memory_gb: float | None = Field(default=None, gt=0, description="memory of one GPU, GB")
    nvlink_domain: int | None = Field(
        default=None, ge=1, description="GPUs that NVLink joins; the node's unless given"
    )


class Container(Part):
    """How a rank gets its software."""

    runtime: Literal["none", "pyxis", "apptainer", "docker"] = "none"
    image: str | None = Field(default=None, description="what the runtime takes: a registry reference or a file")
    mounts: tuple[str, ...] = Field(default=(), description="HOST[:CONTAINER[:ro]]; paths.* come by themselves")

    @field_validator("mounts")
    @classmethod
    def _mounts(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            host, *rest = mount.split(":")
            inside = rest[0] if rest else host
            if len(rest) > 2 or rest[1:] not in ([], ["ro"]) or "," in mount or not (host + inside).startswith("/"):
                raise ValueError(f"{mount!r} isn't HOST[:CONTAINER[:ro]], absolute and without commas")
        return mounts

    @model_validator(mode="after")
    def _image(self) -> "Container":
        if self.runtime != "none" and not self.image:
            raise ValueError(f"runtime {self.runtime} needs an image")
        return self


class Paths(Part):
    """Shared folders, the same on the login node and on every node of a job."""

    models: str = Field(description="hub folders and converted weights")
    data: str = Field(description="prepared data")
    runs: str = Field(description="run directories")

    @field_validator("*")
    @classmethod
    def _absolute(cls, path: str) -> str:
        expanded = os.path.expanduser(path)
        if not expanded.startswith("/"):
            raise ValueError(f"{path!r} isn't absolute")
        return os.path.normpath(expanded)


class Serve(Part):
    """Where `serve` listens; no host is 127.0.0.1 on this machine, and on a cluster every interface, with a key."""

    host: str | None = None
    port: int = Field(default=5000, ge=1, le=65535)


class Login(Part):
    """How to reach the cluster from elsewhere."""

    host: str | None = Field(default=None, description="the login node, as ssh takes it")


class ClusterProfile(Part):
    """One cluster. The field names are the keys of the YAML file."""

    name: str
    description: str = ""
    scheduler: Literal["slurm", "local"]
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    comment: str | None = None
    time: Text = Field(default="04:00:00", description="limit of a job: minutes, HH:MM:SS or D-HH:MM:SS")
    exclusive: bool = False
    gpu_request: Literal["gres", "gpus-per-node", "gpus-per-task", "none"] = "gpus-per-node"
    node: Node = Field(default_factory=Node)
    container: Container = Field(default_factory=Container)
    environment: dict[str, Text] = Field(default={}, description="exported to every rank")
    python: str = Field(
        default="python", description="the one with megatron_mixtral, in the container if there is one"
    )
    paths: Paths
    slurm_version: Text = Field(default=capabilities.OLDEST, description="decides which sbatch options there are")
    slurm_conf: str | None = Field(default=None, description="SLURM_CONF for every call of Slurm's commands")
    signal_lead: int = Field(
        default=300, ge=10, description="seconds of warning before the limit: more than a save takes"
    )
    serve: Serve = Field(default_factory=Serve)
    login: Login = Field(default_factory=Login)
    extra: dict[str, Text | Literal[True]] = Field(
        default={}, description="other sbatch options, NAME: VALUE or NAME: true"
    )

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _as_value_error(quoting.name, value)

    @field_validator("time")
    @classmethod
    def _time(cls, value: str) -> str:
        return time_limit(value)

    @field_validator("environment")
    @classmethod
    def _variables(cls, environment: dict[str, str]) -> dict[str, str]:
        for name in environment:
            _as_value_error(quoting.variable, name)
        return environment

    @field_validator("extra")
    @classmethod
    def _extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for option in extra:
            if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
                raise ValueError(f"{option!r} isn't a long sbatch option without its dashes, such as mail-type")
            if option in OWNED:
                raise ValueError(f"{option!r} is the launcher's own; the profile's keys decide it")
        return extra

    @field_validator("slurm_version")
    @classmethod
    def _version(cls, version: str) -> str:
        if not re.fullmatch(r"\d\d\.\d\d(\.\d+)?", version) or capabilities.number(version) < (22, 5):
            raise ValueError(f"{version!r} isn't a version from {capabilities.OLDEST} on, such as '23.11'")
        return version

    @model_validator(mode="after")
    def _known(self) -> "ClusterProfile":
        known = capabilities.known_options(self.slurm_version)
        for option in self.extra:
            if option not in known:
                near = difflib.get_close_matches(option, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"extra: sbatch of Slurm {self.slurm_version} has no --{option}{hint}")
        if self.is_local and self.container.runtime == "pyxis":
            raise ValueError("container.runtime: pyxis is a part of Slurm, and this cluster has none")
        return self

    @property
    def is_local(self) -> bool:
        """Whether jobs run as processes of this machine."""
        return self.scheduler == "local"

    @property
    def in_container(self) -> bool:
        """Whether ranks run in a container."""
        return self.container.runtime != "none"

    @property
    def slurm_environment(self) -> dict[str, str]:
        """What every call of a Slurm command needs besides the caller's environment."""
        return {"SLURM_CONF": self.slurm_conf} if self.slurm_conf else {}


def time_limit(value: str) -> str:
    """`value` if Slurm reads it as a time limit; `ValueError` otherwise."""
    if not TIME.fullmatch(value):
        raise ValueError(f"{value!r} isn't a time limit; write minutes, HH:MM:SS or D-HH:MM:SS")
    return value


def search_path() -> list[Path]:
    """Folders that profiles are looked for in, first match first; the built-in ones come last."""
    own = [Path(p).expanduser() for p in os.environ.get("MIXLAUNCH_CLUSTERS", "").split(os.pathsep) if p]
    config = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    return [*own, config / "mixlaunch" / "clusters", Path(str(resources.files("launcher.clusters")))]


def available() -> dict[str, Path]:
    """Every profile's name and file; an earlier folder of the search path hides a later one's."""
    found: dict[str, Path] = {}
    for folder in search_path():
        for path in sorted(folder.glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find(cluster: str) -> Path:
    """The file of a cluster's name, or of a path that ends in .yaml; `ProfileError` lists what there is."""
    if cluster.endswith((".yaml", ".yml")):
        path = Path(cluster).expanduser()
        if not path.is_file():
            raise ProfileError(f"cluster profile {cluster}: no such file")
        return path
    found = available()
    if cluster not in found:
        near = difflib.get_close_matches(cluster, found, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ProfileError(f"unknown cluster {quoting.shown(cluster)}{hint} There are: {', '.join(sorted(found))}")
    return found[cluster]


def default() -> str:
    """The cluster that is meant when none is named."""
    return os.environ.get("MIXLAUNCH_CLUSTER") or DEFAULT


def load(cluster: str | None = None) -> ClusterProfile:
    """The profile named by `cluster`, else by $MIXLAUNCH_CLUSTER, else `local`."""
    return read(find(cluster or default()))


def read(path: Path) -> ClusterProfile:
    """One file -> profile, its name the file's unless it says another; `ProfileError` names line and key."""
    try:
        text = path.read_text()
        raw = yaml.load(text, Loader=PlainLoader)
        lines = dict(_lines(yaml.compose(text, Loader=PlainLoader)))
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        raise ProfileError(f"cluster profile {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ProfileError(f"cluster profile {path}: expected keys and values, such as `scheduler: slurm`")
    try:
        return ClusterProfile.model_validate(_expanded({"name": path.stem, **raw}))
    except ValidationError as error:
        raise ProfileError(_explain(path, lines, error)) from error
    except _BadValue as error:
        raise ProfileError(f"{_where(path, lines, error.location)}{error}") from error
    except RecursionError as error:
        raise ProfileError(f"cluster profile {path}: a value contains itself") from error


def _as_value_error(check: Callable[[str, str], str], value: str) -> str:
    """`quoting`'s refusal as the error that pydantic gathers with the others."""
    try:
        return check(value, "value")
    except UsageError as error:
        raise ValueError(str(error).removeprefix("value: ")) from None


class PlainLoader(yaml.SafeLoader):
    """SafeLoader without YAML 1.1's surprises: `12:00:00` stays text and `no`, `on`, `yes` aren't booleans."""


PlainLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern) for tag, pattern in rules if tag not in ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:int")
    ]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(true|false)$"), list("tf"))
PlainLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"-?(0|[1-9][0-9]*)$"), list("-0123456789"))


class _BadValue(ValueError):
    def __init__(self, location: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.location = location


def _expanded(value: Any, location: tuple[str | int, ...] = ()) -> Any:
    """Every string with its $VARIABLES replaced, so that what the script gets is what `clusters show` prints."""
    if isinstance(value, dict):
        return {k: _expanded(v, (*location, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_expanded(v, (*location, i)) for i, v in enumerate(value)]
    if not isinstance(value, str):
        return value
    field = ".".join(map(str, location))
    try:
        return quoting.checked(REFERENCE.sub(_lookup, value), field)
    except KeyError as error:
        raise _BadValue(location, f"{field}: ${error.args[0]} isn't set in the environment") from error
    except UsageError as error:
        raise _BadValue(location, str(error)) from error


def _lookup(match: re.Match[str]) -> str:
    name = match["braced"] or match["plain"]
    return os.environ.get(name) or _defaults()[name]


def _defaults() -> dict[str, str]:
    """Variables that the built-in profiles use and that have a value unless the environment gives another."""
    state = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser() / "mixlaunch"
    return {
        "MIXLAUNCH_PYTHON": sys.executable,
        "MIXLAUNCH_STATE": str(state),
        "MIXLAUNCH_SANDBOX": str(state / "sandbox"),
    }


def _lines(node: Any, location: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """(key path, line) for every key of a composed document."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*location, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*location, index), value.start_mark.line + 1


def _where(path: Path, lines: dict[tuple[str | int, ...], int], location: tuple[str | int, ...]) -> str:
    for length in range(len(location), 0, -1):
        if line := lines.get(location[:length]):
            return f"cluster profile {path}:{line}: "
    return f"cluster profile {path}: "


def _explain(path: Path, lines: dict[tuple[str | int, ...], int], error: ValidationError) -> str:
    """One line per mistake, in the words of this module rather than pydantic's."""
    return "\n".join(_where(path, lines, e["loc"]) + _mistake(e) for e in error.errors(include_url=False))


def _mistake(error: Any) -> str:
    location, kind = error["loc"], error["type"]
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        valid = keys_at(location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {key!r}; {hint}Valid: {', '.join(valid)}"
    if kind == "missing":
        return f"{key} is missing"
    message = error["msg"].removeprefix("Value error, ")
    if not key:
        return str(message)
    given = "" if kind == "value_error" else f" (got {error['input']!r})"
    return f"{key}: {message[0].lower()}{message[1:]}{given}"


@functools.cache
def keys_at(location: tuple[str | int, ...]) -> tuple[str, ...]:
    """The valid keys of the section at `location`."""
    model: Any = ClusterProfile
    for part in location:
        model = model.model_fields[str(part)].annotation
    return tuple(model.model_fields)
