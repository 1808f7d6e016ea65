"""From a plan to a run: its directory, its script, its job, and the record of all three.

Without a job nothing stays behind; an error says whether there is one.
"""

import datetime
import errno
import importlib.metadata
import os
import platform
import re
import shlex
import shutil
import socket
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from secrets import token_hex

from launcher.cluster import bad_nodes
from launcher.cluster.bad_nodes import BadNode
from launcher.common import files
from launcher.errors import Fault, Interrupted, SubmitError, UncertainError, UsageError
from launcher.host import login_node
from launcher.host.login_node import LoginNode
from launcher.planning import secrets, uploads
from launcher.planning.plan import JobPlan
from launcher.runs import record, states
from launcher.runs.record import Run
from launcher.script import lint, render
from launcher.slurm import hostlist
from launcher.submit import answer, local, sbatch, sbatch_ssh
from megatron_mixtral.spec import rundir

TOO_FEW = re.compile(r"Invalid node name|node configuration is not available|More nodes requested", re.I)


def new_path(plan: JobPlan) -> Path:
    """A run directory's path for `plan`, not made yet: name, time, and a suffix so that no two meet."""
    now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path(plan.profile.paths.runs) / f"{plan.name}-{now}-{token_hex(2)}"


def run(plan: JobPlan, *, asked: Sequence[str] = (), path: Path | None = None) -> Run:
    """Render, check, make the run directory, submit, record. Without a job, nothing stays behind."""
    require_port(plan)
    secrets.require(plan)
    plan = leave_out(plan, bad_nodes.read(plan.profile))
    path = path or new_path(plan)
    text = render.render(plan, str(path))
    lint.check(text, plan.profile.slurm_version)
    uploads.bring(plan)
    here = plan.profile.host.place(path)
    with plan.profile.host.submitting(here):
        made = create(plan, here, asked=asked)
        return record.with_job(made, _submitted(plan, text, made))


def _submitted(plan: JobPlan, text: str, run: Run) -> str:
    """The job of a run directory that has none yet; without one the directory is removed."""
    files.write(run.path / rundir.CONFIG, render.config_text(plan))
    try:
        write_secrets(plan, run.path)
        return submit(plan, text, run.path)
    except Interrupted as interrupted:
        record.with_job(run, interrupted.job_id)
        raise
    except KeyboardInterrupt:
        _settle(run)
        raise
    except UncertainError:
        raise
    except (Fault, OSError):
        shutil.rmtree(run.path)
        raise


def _settle(run: Run) -> None:
    """After a Ctrl-C around the submission: keep the run if it got a job, remove it if it surely didn't."""
    if job_id := job_after_all(run):
        record.with_job(run, job_id)
        raise answer.interrupted(job_id)
    shutil.rmtree(run.path)


def job_after_all(run: Run) -> str | None:
    """After a Ctrl-C around the submission: the job that Slurm has; on this machine whatever began is ended."""
    if run.is_local:
        states.cancel_local(run.path, "")
        return None
    return states.find_job(run.path / rundir.SCRIPT, run.host)


def create(plan: JobPlan, path: Path, *, asked: Sequence[str] = ()) -> Run:
    """Make the run directory with its record; `Fault` if it can't be made."""
    facts = {
        "schema": record.SCHEMA,
        "name": path.name,
        "job": plan.job,
        "created": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "asked": list(asked),
        "host": socket.gethostname(),
        "nodes": plan.nodes,
        "tasks_per_node": plan.tasks_per_node,
        "layout": asdict(plan.layout) if plan.layout else None,
        "config": plan.config,
        "outputs": list(plan.outputs),
        "resumable": plan.resumable,
        "secrets": list(plan.secrets),
        "time": plan.time,
        "exclude": list(plan.exclude),
        "pipeline": asdict(plan.link) if plan.link else None,
        "profile": plan.profile.model_dump(mode="json"),
        "versions": {"mixlaunch": importlib.metadata.version("mixlaunch"), "python": platform.python_version()},
        "jobs": [],
        "submitting": True,
        "resubmissions": [],
        "cancelled": False,
    }
    try:
        path.mkdir(parents=True)
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o022)  # what is in it decides what runs as its owner
        (path / rundir.LOGS).mkdir()  # Slurm writes its own output there and makes no folders
    except OSError as error:
        raise Fault(f"run directory {path}: {error.strerror}") from error
    made = Run(path=path, record=facts)
    record.write(made)
    return made


def submit(plan: JobPlan, text: str, run_dir: Path) -> str:
    """Submit `text` as `run_dir`'s next job and return its id."""
    try:
        return _submit(plan, text, run_dir)
    except SubmitError as error:
        left_out = re.search(r"^#SBATCH --exclude=(.*)$", text, re.MULTILINE)
        if type(error) is not SubmitError or left_out is None or not TOO_FEW.search(str(error)):
            raise
        hint = f"It excludes {left_out[1]}; `mixlaunch nodes` shows the list of bad nodes."
        raise SubmitError(f"{error}\n{hint}") from error


def _submit(plan: JobPlan, text: str, run_dir: Path) -> str:
    """On the login node, by a process of this machine, or by this machine's sbatch."""
    host = login_node.of(run_dir, plan.profile.slurm_conf)
    if isinstance(host, LoginNode):
        return sbatch_ssh.submit(host, text, run_dir, options=plan.queue_options)
    caller = without_secrets(os.environ, run_dir)
    if plan.profile.is_local:
        return local.submit(plan, text, run_dir, caller=caller)
    return sbatch.submit(plan, text, run_dir, host=host, caller=caller)


def write_secrets(plan: JobPlan, run_dir: Path) -> None:
    """Make secrets.env, which only its owner reads; none if there is nothing to put in."""
    names = secrets.carried(plan)
    if not names:
        return
    text = "".join(f"{name}={shlex.quote(os.environ[name])}\n" for name in names)
    try:
        descriptor = os.open(run_dir / rundir.SECRETS, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(os.fsencode(text))
    except OSError as error:
        raise Fault(f"{run_dir / rundir.SECRETS}: {error.strerror}") from error


def without_secrets(environment: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """`environment` without the run's secrets, because Slurm stores the environment of sbatch."""
    try:
        lines = (run_dir / rundir.SECRETS).read_bytes().splitlines()
    except OSError:
        return dict(environment)
    names = {os.fsdecode(line.partition(b"=")[0]) for line in lines}
    return {name: value for name, value in environment.items() if name not in names}


def keep_off(plan: JobPlan, exclude: Iterable[str], *, health_check: bool) -> JobPlan:
    """`plan` that keeps off the nodes of --exclude and those that a health check finds unfit."""
    nodes = tuple(hostlist.of_option("--exclude", exclude))
    for option, given in (("--exclude", nodes), ("--health-check", health_check)):
        if given and plan.profile.is_local:
            raise UsageError(f"{option}: {plan.profile.name} is only this machine; there are no nodes to exclude")
    profile = plan.profile.model_copy(update={"health_check": True}) if health_check else plan.profile
    return replace(plan, profile=profile, exclude=nodes)


def leave_out(plan: JobPlan, listed: Iterable[BadNode]) -> JobPlan:
    """`plan` without the nodes on its cluster's list."""
    return replace(plan, bad_nodes=tuple(entry.node for entry in listed))


def require_port(plan: JobPlan) -> None:
    """`UsageError` when the port that a server on this machine was told to take is somebody else's."""
    if plan.job != "serve" or not plan.profile.is_local or plan.config["other_port"]:
        return
    host, port = plan.config["host"], plan.config["port"]
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        hint = "; without --port the server takes the next free port" if error.errno == errno.EADDRINUSE else ""
        raise UsageError(f"--port: {host}:{port}: {error.strerror}{hint}") from None
