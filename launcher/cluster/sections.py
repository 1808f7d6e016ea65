"""The sections of a cluster profile. Each is strict about its keys and values, and immutable.

Rules over two sections are checked by the profile.
"""

import fnmatch
import os
import re
import socket
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from launcher.cluster import containers
from launcher.common import quoting
from launcher.errors import UsageError
from launcher.host import ssh


def _text(value: Any) -> Any:
    """Numbers are accepted as text. Booleans aren't, because 1, true and True differ in an environment."""
    if isinstance(value, bool):
        raise ValueError(f"write {str(value).lower()!r} or 1 in quotes, exactly as the variable should be")
    return str(value) if isinstance(value, int | float) else value


Text = Annotated[str, BeforeValidator(_text), WithJsonSchema({"type": ["string", "number"]})]
Checked = TypeVar("Checked")
NUMBERS = tuple[Annotated[int, Field(ge=0)], ...]
# `--cpu-bind=verbose,map_cpu:0,1`, `--gpu-bind=single:1`, `--distribution=block:cyclic`: srun's own words.
BIND = re.compile(r"[a-z][a-z_]*([,:*][A-Za-z0-9_,:*.-]+)?")


def _no_option(value: str | None) -> str | None:
    """Refuse a value that a command would read as one of its options."""
    if value is not None and value.startswith("-"):
        raise ValueError(f"{quoting.shown(value)} would be read as an option")
    return value


class Part(BaseModel):
    """Base of every section: immutable, and strict about its keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        for each in value if kind == NUMBERS and isinstance(value, list) else [value]:
            if isinstance(each, bool) and kind in (int, int | None, float, float | None, NUMBERS):
                raise ValueError(f"{str(each).lower()} isn't a number")
        return value


class Node(Part):
    """One node's shape. `gpus: 0` means that ranks run on processors and any number of them fits."""

    gpus: int = Field(default=0, ge=0, le=10_000, description="GPUs a node")
    gpu_type: Text | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="as in gpu:a100:8, if the cluster needs it",
    )
    cpus: int | None = Field(default=None, ge=1, description="cores a node; a rank gets its share")
    memory_gb: int | None = Field(
        default=None, ge=1, description="memory a node, GB; requested unless nodes are exclusive"
    )
    gpu_memory_gb: float | None = Field(default=None, gt=0, le=1_000_000, description="memory of one GPU, GB")
    nvlink_domain: int | None = Field(
        default=None, ge=1, description="GPUs that NVLink joins; the node's unless given"
    )
    fabric_gb_s: float | None = Field(
        default=None, gt=0, description="what one GPU can send to other nodes, GB/s; only for estimates"
    )


class Binding(Part):
    """The cores, memory and GPUs that a rank is bound to."""

    cpu: str | None = Field(default=None, description="srun's --cpu-bind: cores, none, map_cpu:0,8,...")
    memory: str | None = Field(default=None, description="srun's --mem-bind: local, none, ...")
    gpu: str | None = Field(default=None, description="srun's --gpu-bind: none, closest, single:1, ...")
    distribution: str | None = Field(default=None, description="srun's --distribution: block:block, ...")
    numa: NUMBERS = Field(default=(), description="NUMA node of each GPU; numactl binds a rank to that of its GPU")

    @field_validator("cpu", "memory", "gpu", "distribution")
    @classmethod
    def _words(cls, value: str | None) -> str | None:
        if value is not None and not BIND.fullmatch(value):
            raise ValueError(f"{quoting.shown(value)} isn't srun's, such as cores or map_cpu:0,8")
        return value

    @property
    def of_srun(self) -> dict[str, str]:
        """srun's options and their values."""
        names = {"cpu": "cpu-bind", "memory": "mem-bind", "gpu": "gpu-bind", "distribution": "distribution"}
        return {option: value for name, option in names.items() if (value := getattr(self, name)) is not None}


class Container(Part):
    """How a rank gets its software."""

    runtime: containers.Name = "none"
    image: str | None = Field(default=None, description="what the runtime takes: a registry reference or a file")
    mounts: tuple[str, ...] = Field(default=(), description="HOST[:CONTAINER[:ro]]; paths.* are always mounted")

    @field_validator("mounts")
    @classmethod
    def _mounts(cls, mounts: tuple[str, ...]) -> tuple[str, ...]:
        for mount in mounts:
            host, *rest = mount.split(":")
            inside = rest[0] if rest else host
            absolute = host.startswith("/") and inside.startswith("/")
            if len(rest) > 2 or rest[1:] not in ([], ["ro"]) or "," in mount or not absolute:
                raise ValueError(f"{mount!r} isn't HOST[:CONTAINER[:ro]], absolute and without commas")
            as_value_error(quoting.path, host)
            as_value_error(quoting.path, inside)
        return mounts

    @field_validator("image")
    @classmethod
    def _name(cls, image: str | None) -> str | None:
        return as_value_error(quoting.path, image) if image and _no_option(image) else image

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
        return as_value_error(quoting.path, os.path.normpath(expanded))

    @field_validator("runs")
    @classmethod
    def _for_output(cls, path: str) -> str:
        if "\\" in path:
            raise ValueError(f"{path!r} holds a backslash, which Slurm removes from the path of a job's output")
        return path


class Serve(Part):
    """Where `serve` listens; no host is 127.0.0.1 on this machine, and on a cluster every interface, with a key."""

    host: str | None = Field(default=None, description="address; beyond 127.0.0.1 the server requires a key")
    port: int = Field(default=5000, ge=1, le=65535)


class Login(Part):
    """How to reach the cluster from elsewhere: over ssh, with what the user's own configuration says."""

    host: str | None = Field(default=None, description="the login node, as ssh takes it: name, user@name or alias")
    options: dict[str, Text] = Field(default={}, description="of ssh, beyond its configuration files: NAME: VALUE")
    inside: tuple[str, ...] = Field(
        default=(), description="machines that need no ssh, by name or pattern; login.host itself is one"
    )

    @field_validator("host")
    @classmethod
    def _name(cls, host: str | None) -> str | None:
        if host and not re.fullmatch(r"[\w.+@-]+", _no_option(host) or ""):
            raise ValueError(f"{host!r} isn't a name for ssh; ports and addresses with colons go into options")
        return host or None

    @field_validator("options")
    @classmethod
    def _words(cls, options: dict[str, str]) -> dict[str, str]:
        for name, value in options.items():
            if not re.fullmatch(r"[A-Za-z]+", name) or not value:
                raise ValueError(f"{name!r} isn't an option of ssh_config with a value, such as Port: 2222")
        return options

    @property
    def node(self) -> ssh.Login | None:
        """The login node to use; None on the cluster itself."""
        if self.host is None:
            return None
        here = socket.gethostname()
        names = (here, here.split(".")[0])
        inside = any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in self.inside)
        if inside or _is_same_machine(self.host.rpartition("@")[2], here):
            return None
        return ssh.Login(self.host, tuple(sorted(f"{option}={value}" for option, value in self.options.items())))


def _is_same_machine(one: str, other: str) -> bool:
    """Whether two host names mean one machine; a name without a domain is at home in any."""
    if one == "localhost":
        return False  # a forwarded port
    if "." in one and "." in other:
        return one == other
    return one.split(".")[0] == other.split(".")[0]


def as_value_error(check: Callable[[str, str], Checked], value: str) -> Checked:
    """`quoting`'s refusal as the error that pydantic gathers with the others."""
    try:
        return check(value, "value")
    except UsageError as error:
        raise ValueError(str(error).removeprefix("value: ")) from None
