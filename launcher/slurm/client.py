"""Questions to Slurm's own commands: each call an argument list with a time limit, each failure a `Fault`.

Nothing is cached, and output is asked for in explicit formats, never read from tables made for people.
"""

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from launcher.errors import Fault
from launcher.host import ssh
from launcher.host.ssh import Login

SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin")  # daemons live here, and an ordinary PATH lacks them
OF_THE_SHELL = ("sh", "id")  # questions about the machine that Slurm's commands run on
TIMEOUT = 30  # seconds; a busy controller takes some
# Everything else (PENDING, COMPLETING, SIGNALING, REQUEUED, ...) may still turn into something.
ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "BOOT_FAIL",
    "DEADLINE",
    "PREEMPTED",  # and not requeued
    "REVOKED",
}


@dataclass(frozen=True, kw_only=True)
class JobState:
    """What Slurm says about one job. Times are Slurm's local text, empty where it doesn't know."""

    id: str
    state: str
    reason: str = ""
    nodes: str = ""
    start: str = ""
    time_left: str = ""
    exit_code: str = ""  # CODE:SIGNAL of the batch script
    command: str = ""  # the script's path

    @property
    def active(self) -> bool:
        """Whether the job may still do something."""
        return self.state not in ENDED


def which(program: str) -> str | None:
    """Where `program` lies, daemons' folders included."""
    return shutil.which(program, path=os.pathsep.join([os.environ.get("PATH", ""), *SYSTEM_FOLDERS]))


def call(program: str, *arguments: str, environment: Mapping[str, str], timeout: float = TIMEOUT) -> str:
    """Standard output of one Slurm command; `Fault` when it's missing, fails or doesn't answer.

    It runs on this machine, or on the login node that `environment` names (`ssh.LOGIN`).
    """
    if login := environment.get(ssh.LOGIN):
        return _call_there(Login.decoded(login), [program, *arguments], environment, timeout)
    path = which(program)
    if path is None:
        raise Fault(f"{program}: not found; Slurm's commands aren't on this machine's PATH")
    if program not in OF_THE_SHELL:
        require_conf(environment)
    try:
        done = subprocess.run(
            [path, *arguments],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise Fault(f"{program}: no answer within {timeout:g} s") from None
    except OSError as error:
        raise Fault(f"{program}: {error}") from error
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}"
        raise Fault(f"{program}: {reason}")
    return done.stdout


def require_conf(environment: Mapping[str, str]) -> None:
    """`Fault` where the configuration isn't there: Slurm's commands would look for it for a minute."""
    conf = environment.get("SLURM_CONF")
    if conf and not os.path.exists(conf):
        raise Fault(
            f"slurm_conf: {conf} isn't on this machine; it is on a login node, a sandbox's while that is up"
        )


def _call_there(login: Login, argv: list[str], environment: Mapping[str, str], timeout: float) -> str:
    done = ssh.run(login, ssh.command(argv, environment), timeout=timeout)
    if done.code == ssh.NOT_FOUND:
        raise Fault(f"{argv[0]}: not found on the PATH of {login.host}, nor on that of a login shell there")
    if done.code:
        raise Fault(f"{argv[0]}: {done.said}")
    return done.out


def queue(environment: Mapping[str, str], *, timeout: float = TIMEOUT) -> dict[str, JobState]:
    """This user's jobs that the controller still knows, the lately finished too, by id."""
    form = "%i|%T|%N|%S|%L|%r|%o"
    arguments = ("--noheader", "--states=all", "--me", f"--format={form}")
    jobs = {}
    for line in call("squeue", *arguments, environment=environment, timeout=timeout).splitlines():
        job, state, nodes, start, left, reason, command = line.split("|", 6)
        jobs[job] = JobState(
            id=job,
            state=state,
            nodes=nodes,
            start=_known(start),
            time_left=_known(left),
            reason=_known(reason),
            command=command,
        )
    return jobs


def accounting(ids: Iterable[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    """The same from sacct for `ids`, however old; `Fault` where the cluster keeps no accounts."""
    fields = "JobIDRaw,State,NodeList,Start,ExitCode"
    jobs = ",".join(ids)
    if not jobs:
        return {}
    arguments = ("--allocations", "--noheader", "--parsable2", f"--jobs={jobs}", f"--format={fields}")
    found = {}
    for line in call("sacct", *arguments, environment=environment).splitlines():
        job, state, nodes, start, code = line.split("|")
        # "CANCELLED by 1000" -> CANCELLED
        found[job] = JobState(
            id=job, state=state.split()[0], nodes=_known(nodes), start=_known(start), exit_code=code
        )
    return found


def states(ids: Iterable[str], environment: Mapping[str, str]) -> dict[str, JobState]:
    """Every one of `ids` that Slurm still knows; `Fault` only if neither the controller nor the accounts answer."""
    wanted = list(ids)
    faults: list[Fault] = []
    found: dict[str, JobState] = {}
    try:
        found = {job: state for job, state in queue(environment).items() if job in wanted}
    except Fault as fault:
        faults.append(fault)
    if forgotten := [job for job in wanted if job not in found]:
        try:
            found |= accounting(forgotten, environment)
        except Fault as fault:
            faults.append(fault)
    if len(faults) == 2:
        raise faults[0]
    return found


def seconds(time: str) -> int:
    """Slurm's time (minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S) in seconds; `ValueError` for UNLIMITED."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if days:
        hours, minutes, rest = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, rest = parts
    else:
        hours, minutes, rest = (0, *parts, 0)[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + rest


def _known(text: str) -> str:
    return "" if text in ("N/A", "None", "Unknown", "(null)", "None assigned", "INVALID") else text
