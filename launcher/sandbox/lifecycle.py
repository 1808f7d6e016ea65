"""A private, real Slurm on this machine: slurmctld, one slurmd for each node, munge, and accounting where MariaDB
is installed.

It belongs to the current user, and has one folder and its own ports. `down` ends it and removes the folder.
"""

import contextlib
import dataclasses
import fcntl
import functools
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.common import processes, state_dir
from launcher.errors import Fault, UsageError
from launcher.host.local import Local
from launcher.sandbox import config, daemons
from launcher.sandbox.config import ClusterShape, SlurmFiles
from launcher.sandbox.record import MARK, STATE, Sandbox, read, write

PORTS = range(30_000, 32_768)  # above those of jobs, below Linux's range for outgoing connections
LONGEST = (
    60  # characters of a folder for sockets; slurmstepd adds a long path, and a socket's has at most 107 bytes
)
PACKAGES = {
    "munged": "munge",
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "sbatch": "slurm-client",
    "srun": "slurm-client",
}
ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server", "mariadb-install-db": "mariadb-server"}


@dataclass(frozen=True, kw_only=True)
class Status:
    """What `status` found: `state` is up, down or broken (a daemon died; the next `up` starts afresh)."""

    folder: Path
    state: str
    sandbox: Sandbox | None = None
    dead: tuple[str, ...] = ()
    nodes: dict[str, str] = dataclasses.field(default_factory=dict)
    jobs: int = 0


def default_folder() -> Path:
    """$MIXLAUNCH_SANDBOX, else `mixlaunch/sandbox` in the user's state folder."""
    return Path(os.path.expanduser(os.environ.get("MIXLAUNCH_SANDBOX") or state_dir.state() / "sandbox"))


def missing_packages() -> list[str]:
    """Debian packages that a sandbox needs and this machine lacks."""
    return sorted({package for program, package in PACKAGES.items() if not processes.which(program)})


def accounting_available() -> bool:
    """Whether slurmdbd and MariaDB are installed, so that sacct and accounts work."""
    return all(processes.which(program) for program in ACCOUNTING_PACKAGES)


def why_no_accounting(asked: bool | None) -> str:
    """For people: what a sandbox without accounting lacks, and how to get accounting."""
    if asked is False:
        return "none, as asked: no sacct, and every account and QoS is accepted"
    packages = sorted({package for program, package in ACCOUNTING_PACKAGES.items() if not processes.which(program)})
    return f"none: no sacct; on Debian: apt-get install {' '.join(packages)}"


def up(
    folder: Path | None = None,
    shape: ClusterShape | None = None,
    *,
    accounting: bool | None = None,
    timeout: float = 120,
) -> Sandbox:
    """Start a sandbox in `folder` and return once its nodes are idle; one that is already up is returned as it is.

    `accounting=None` means where possible. What a crash left half-up in `folder` is cleaned away first.
    """
    shape = shape or ClusterShape()
    folder = _checked(folder or default_folder(), shape)
    accounting = accounting_available() if accounting is None else accounting
    with _locked(folder):
        found = status(folder)
        if found.state == "up" and found.sandbox:
            if found.sandbox.shape != shape:
                raise UsageError(
                    f"{folder}: a sandbox of another shape is up ({found.sandbox.shape}); run `sandbox down` first"
                )
            return found.sandbox
        _clear(folder)
        return _start_or_clear(folder, shape, accounting, time.monotonic() + timeout)


def down(folder: Path | None = None) -> bool:
    """End the sandbox in `folder` with its jobs and remove the folder; False if there is none."""
    folder = (folder or default_folder()).absolute()
    if not folder.exists():
        return False
    with _locked(folder):
        _clear(folder)
        shutil.rmtree(folder)
    return True


def status(folder: Path | None = None) -> Status:
    """What is in `folder`, and whether its daemons run and answer."""
    folder = (folder or default_folder()).absolute()
    sandbox = read(folder)
    if sandbox is None:
        return Status(folder=folder, state="down")
    dead = tuple(
        name for name, pid in sandbox.processes.items() if not processes.is_marked(pid, **{MARK: sandbox.mark})
    )
    if dead or not sandbox.ready:
        return Status(folder=folder, state="broken", sandbox=sandbox, dead=dead)
    try:
        nodes = _node_states(sandbox)
        jobs = len(daemons.call(sandbox, "squeue", "--noheader", "--format=%i").split())
    except Fault:
        return Status(folder=folder, state="broken", sandbox=sandbox, dead=("slurmctld",))
    return Status(folder=folder, state="up", sandbox=sandbox, nodes=nodes, jobs=jobs)


def _checked(folder: Path, shape: ClusterShape) -> Path:
    """Refuse what can't work before anything is written."""
    folder = Path(os.path.expanduser(folder)).absolute()
    if packages := missing_packages():
        raise UsageError(f"Slurm's daemons aren't installed; on Debian: apt-get install {' '.join(packages)}")
    if odd := re.search(r"[^\w./+@:-]", str(folder)):
        raise UsageError(
            f"{folder}: Slurm doesn't accept {odd[0]!r} in a path; set MIXLAUNCH_SANDBOX to another folder"
        )
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder}: not a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / STATE).exists():
        raise UsageError(f"{folder}: not empty, and not a sandbox; give another folder")
    for name, value, least in (("nodes", shape.nodes, 1), ("gpus", shape.gpus, 0), ("cpus", shape.cpus, 1)):
        if value < least:
            raise UsageError(f"{name}: {value} must be at least {least}")
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time: the lock is on the folder itself, so that no lock file is left behind."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_open(folder, descriptor):
                yield
                return
        finally:
            os.close(descriptor)


def _is_open(folder: Path, descriptor: int) -> bool:
    """Whether `descriptor` still is `folder`: a `down` that had the lock before us may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(folder.stat(), os.fstat(descriptor))
    return False


def _start_or_clear(folder: Path, shape: ClusterShape, accounting: bool, deadline: float) -> Sandbox:
    """Start, or clear what was started. If another program took one of the ports meanwhile, try others."""
    try:
        return _start(folder, shape, accounting, deadline)
    except BaseException as error:
        log, taken = _last_errors(folder), "Address already in use" in _logs(folder)
        _clear(folder)
        if isinstance(error, Fault) and taken and time.monotonic() < deadline:
            return _start_or_clear(folder, shape, accounting, deadline)
        folder.rmdir()
        if isinstance(error, Fault):
            raise Fault(f"the sandbox didn't start: {error}{log}") from error
        raise


def _start(folder: Path, shape: ClusterShape, accounting: bool, deadline: float) -> Sandbox:
    mark = secrets.token_hex(8)
    sockets = folder if len(str(folder)) <= LONGEST else Path(f"/tmp/mixlaunch-{mark}")
    files = _slurm_files(folder, sockets, shape, accounting)
    sandbox = Sandbox(folder=folder, sockets=sockets, mark=mark, shape=shape, processes={}, accounting=accounting)
    write(sandbox)  # before the first process, so a crash at any later point can be cleaned up
    _lay_out(shape, files)
    daemons.start_munge(sandbox, deadline)
    if accounting:
        daemons.start_accounting(sandbox, deadline)
    daemons.launch(sandbox, "slurmctld", "slurmctld", "-D", "-i")
    for name in shape.node_names():
        daemons.launch(sandbox, name, "slurmd", "-D", "-N", name)
    daemons.wait(sandbox, functools.partial(_all_idle, sandbox), deadline)
    sandbox = dataclasses.replace(sandbox, ready=True)
    write(sandbox)
    return sandbox


def _slurm_files(folder: Path, sockets: Path, shape: ClusterShape, accounting: bool) -> SlurmFiles:
    ports = _free_ports(shape.nodes + 2)
    return SlurmFiles(
        folder=folder,
        sockets=sockets,
        user=getpass.getuser(),
        host=socket.gethostname().split(".")[0],
        version=_slurm_version(),
        controller_port=ports[0],
        database_port=ports[1] if accounting else None,
        node_ports=tuple(ports[2:]),
        first_job_id=random.randrange(1_000, 60_000),
    )


def _slurm_version() -> tuple[int, int]:
    """(22, 5) of `slurm-wlm 22.05.8`."""
    answer = Local().call("slurmctld", "-V")
    if match := re.search(r"(\d+)\.(\d+)", answer):
        return int(match[1]), int(match[2])
    raise Fault(f"slurmctld -V answered {answer!r}")


def _free_ports(count: int) -> list[int]:
    ports: list[int] = []
    for port in random.sample(PORTS, k=len(PORTS)):
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("", port))
            ports.append(port)
        if len(ports) == count:
            return ports
    raise Fault(f"fewer than {count} free ports between {PORTS.start} and {PORTS.stop}")


def _lay_out(shape: ClusterShape, files: SlurmFiles) -> None:
    folder = files.folder
    folder.chmod(0o700)
    if files.sockets != folder:
        files.sockets.mkdir(mode=0o700)
    (files.sockets / "spool").mkdir()
    for name in ("state", "logs", "run", "gpus", "database", "database/tmp"):
        (folder / name).mkdir()
    for index in range(shape.gpus):
        (folder / "gpus" / f"gpu{index}").touch()
    _private(folder / "munge.key", secrets.token_bytes(128))
    (folder / "slurm.conf").write_text(config.slurm_conf(shape, files))
    (folder / "gres.conf").write_text(config.gres_conf(shape, files))
    (folder / "cgroup.conf").write_text(config.cgroup_conf(files))
    (folder / "plugstack.conf").touch()  # don't load the system's own plugins
    if files.database_port:
        _private(folder / "slurmdbd.conf", config.slurmdbd_conf(files).encode())


def _private(path: Path, content: bytes) -> None:
    with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as stream:
        stream.write(content)


def _all_idle(sandbox: Sandbox) -> bool:
    with contextlib.suppress(Fault):
        states = _node_states(sandbox)
        return len(states) == sandbox.shape.nodes and set(states.values()) == {"idle"}
    return False


def _node_states(sandbox: Sandbox) -> dict[str, str]:
    lines = daemons.call(sandbox, "sinfo", "--noheader", "--Node", "--format=%N %T").splitlines()
    return dict(line.split(maxsplit=1) for line in lines)


def _clear(folder: Path) -> None:
    """End everything that the sandbox in `folder` started, jobs too, and empty the folder."""
    sandbox = read(folder)
    if sandbox is None:
        if any(folder.iterdir()):
            raise UsageError(f"{folder}: not a sandbox; nothing was ended or removed")
        return
    ours = functools.partial(processes.marked, **{MARK: sandbox.mark})
    controller = sandbox.processes.get("slurmctld", -1)
    # The controller ends first, so nothing new starts. Then the jobs end, while their slurmstepd still knows them.
    # They get no time to save, because their files are removed.
    for find in (
        lambda: [pid for pid in ours() if pid == controller],
        functools.partial(_job_processes, sandbox),
    ):
        processes.stop(find, grace=0, first=signal.SIGKILL)
    if left := processes.stop(ours, grace=0, first=signal.SIGKILL):
        raise Fault(f"{folder}: these processes can't be ended: {left}")
    if sandbox.sockets != folder:
        shutil.rmtree(sandbox.sockets, ignore_errors=True)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == STATE):  # the record last
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _job_processes(sandbox: Sandbox) -> list[int]:
    ours = processes.marked(**{MARK: sandbox.mark})
    escaped = processes.marked(SLURM_CONF=str(sandbox.slurm_conf), SLURM_JOB_ID="")
    return sorted((set(processes.descendants(ours)) | set(escaped)) - set(ours) - {os.getpid()})


def _logs(folder: Path) -> str:
    return "".join(log.read_text(errors="replace") for log in (folder / "logs").glob("*"))


def _last_errors(folder: Path) -> str:
    """The last error line of each daemon that wrote one."""
    found = []
    for log in sorted((folder / "logs").glob("*")):
        lines = [
            line for line in log.read_text(errors="replace").splitlines() if re.search(r"error|fatal", line, re.I)
        ]
        found += [f"\n  {log.name}: {lines[-1][:300]}"] if lines else []
    return "".join(found)
