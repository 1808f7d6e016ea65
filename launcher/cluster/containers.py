"""The container runtimes that ranks can run in, and how each shows that it is there.

How one is called stands in its template, `container_NAME.sh.j2`. Another runtime is that template and a row here.
"""

from dataclasses import dataclass
from typing import Literal

Name = Literal["none", "pyxis", "apptainer", "docker"]


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """`programs` are those that logs complain about where it isn't there."""

    programs: tuple[str, ...]
    srun_option: str = ""  # by which srun shows it: such a runtime is a part of Slurm
    image: str = ""  # such as a first profile may name


RUNTIMES: dict[Name, Runtime] = {
    "pyxis": Runtime(programs=("enroot",), srun_option="--container-image", image="/shared/images/mixlaunch.sqsh"),
    "apptainer": Runtime(programs=("apptainer", "singularity"), image="/shared/images/mixlaunch.sif"),
    "docker": Runtime(programs=("docker",)),
}
PROGRAMS = tuple(program for runtime in RUNTIMES.values() for program in runtime.programs)
