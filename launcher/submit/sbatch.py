"""From a script to a job, through submitit: Slurm gets our text verbatim, this machine a process that outlives us.

A submission ends in a job's id or in an error that says whether there is a job: never in two, nor in one unnoticed.
"""

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from submitit import helpers
from submitit.core import core
from submitit.local import local
from submitit.slurm import slurm as submitit_slurm

from launcher.common import processes
from launcher.errors import Fault, Interrupted, SubmitError, UncertainError
from launcher.host import copies
from launcher.planning import secrets
from launcher.planning.jobs import JobPlan
from launcher.runs.state import MARK, SCRIPT, find_job
from launcher.slurm import client

SBATCH_TIMEOUT = 60  # seconds
GRACE = 15
SUBMITTED = re.compile(r"^Submitted batch job (\d+)", re.MULTILINE)
TOO_FEW = re.compile(r"Invalid node name|node configuration is not available|More nodes requested", re.I)
UNREACHABLE = re.compile(r"\(connect failure\)|[Cc]onnection refused")


class VerbatimExecutor(submitit_slurm.SlurmExecutor):
    """submitit's Slurm executor with our text in place of the one it would write."""

    def __init__(
        self, run_dir: Path, text: str, *, tasks: int, environment: Mapping[str, str], options: Sequence[str] = ()
    ) -> None:
        for program in ("sbatch", "srun"):
            if client.which(program) is None:
                raise SubmitError(f"{program}: not found on PATH; submit from a login node of the cluster")
        super().__init__(_submitit_folder(run_dir))
        self._script = run_dir / SCRIPT
        self._text = text
        self._tasks = tasks
        self._environment = environment
        self._options = options

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    def _num_tasks(self) -> int:
        return self._tasks

    def _submit_command(self, command: str) -> core.Job[Any]:
        self._script.write_text(self._make_submission_file_text(command, ""))
        sbatch, *rest = self._make_submission_command(self._script)
        job_id = _sbatch([sbatch, *self._options, *rest], self._script, self._text, self._environment)
        return self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))


class DetachedExecutor(local.LocalExecutor):
    """submitit's local executor, its controller in a session of its own and running our script as it stands."""

    def __init__(self, run_dir: Path, text: str, *, seconds: int, lead: int) -> None:
        super().__init__(_submitit_folder(run_dir))
        self._run_dir = run_dir
        self._text = text
        self._seconds = seconds
        self._lead = lead

    def _submit_command(self, command: str) -> local.LocalJob[Any]:
        script = self._run_dir / SCRIPT
        script.write_text(self._text)
        environment = {
            **secrets.without(os.environ, self._run_dir),
            MARK: str(self._run_dir),
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_COMMAND": f"bash {SCRIPT}",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(self._seconds),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self._lead),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        argv = [sys.executable, "-m", "submitit.local._local", str(self.folder)]
        pid = processes.start(argv, env=environment, cwd=self._run_dir, log=self.folder / "controller.log")
        return local.LocalJob(folder=self.folder, job_id=str(pid))


def submit(plan: JobPlan, text: str, run_dir: Path) -> str:
    """Submit `text` as `run_dir`'s next job and return its id."""
    try:
        return _submit(plan, text, run_dir)
    except SubmitError as error:
        left_out = re.search(r"^#SBATCH --exclude=(.*)$", text, re.MULTILINE)
        if type(error) is not SubmitError or left_out is None or not TOO_FEW.search(str(error)):
            raise
        hint = f"It was to run without {left_out[1]}; `mixlaunch nodes` shows the list of bad ones."
        raise SubmitError(f"{error}\n{hint}") from error


def _submit(plan: JobPlan, text: str, run_dir: Path) -> str:
    if login := copies.login_of(run_dir):
        from launcher.submit.sbatch_ssh import submit_far

        return submit_far(
            login, text, run_dir, environment=plan.profile.slurm_environment, options=plan.queue_options
        )
    executor: core.PicklingExecutor
    if plan.profile.is_local:
        executor = DetachedExecutor(run_dir, text, seconds=client.seconds(plan.time), lead=plan.profile.signal_lead)
    else:
        environment = plan.profile.slurm_environment
        client.require_conf(environment)
        executor = VerbatimExecutor(
            run_dir, text, tasks=plan.world, environment=environment, options=plan.queue_options
        )
    # What submitit records as the job's function: the script, run by hand.
    return executor.submit(helpers.CommandFunction(["bash", str(run_dir / SCRIPT)])).job_id


def _submitit_folder(run_dir: Path) -> Path:
    folder = run_dir / "submitit"
    folder.mkdir(exist_ok=True)
    return folder


def _sbatch(argv: list[str], script: Path, text: str, environment: Mapping[str, str]) -> str:
    """Run sbatch once, to its end, and return the job's id."""
    process = subprocess.Popen(
        argv,
        env=secrets.without(_environment(text, environment), script.parent),
        cwd=script.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # the terminal's Ctrl-C is for us: sbatch must end in a job or in none
    )
    was_interrupted = False
    try:
        output, complaint = process.communicate(timeout=SBATCH_TIMEOUT)
    except KeyboardInterrupt:
        was_interrupted = True
        output, complaint = _finish(process)
    except subprocess.TimeoutExpired:
        output, complaint = _kill(process)
        complaint = f"no answer within {SBATCH_TIMEOUT} s. {complaint}".strip()
    job_id = job_of(process.returncode, output, complaint, script, environment)
    if was_interrupted:
        raise interrupted(job_id)
    return job_id


def interrupted(job_id: str) -> Interrupted:
    """What to say when Ctrl-C came too late."""
    return Interrupted(f"interrupted, but Slurm has the job: {job_id}; `scancel {job_id}` ends it", job_id)


def _finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        return _kill(process)


def _kill(process: "subprocess.Popen[str]") -> tuple[str, str]:
    process.kill()
    return process.communicate()


def job_of(code: int, output: str, complaint: str, script: Path, environment: Mapping[str, str]) -> str:
    """What sbatch's answer means; where it isn't plain, Slurm is asked whether there is a job of this script."""
    match = SUBMITTED.search(output)
    if code == 0 and match:
        return match[1]
    said = f"sbatch: {complaint.strip() or output.strip() or f'exit {code}'}"
    if code and UNREACHABLE.search(complaint):
        raise SubmitError(f"{said}\nNothing was submitted.")
    try:
        found = find_job(script, environment)
    except Fault as fault:
        raise UncertainError(
            f"{said}\nWhether there is a job isn't known, because Slurm doesn't answer ({fault}). "
            f"`mixlaunch status {script.parent.name}` finds it once Slurm does; don't submit again before."
        ) from fault
    if found is None:
        raise SubmitError(f"{said}\nNothing was submitted.")
    return found


def decided_by(text: str) -> set[str]:
    """Variables by which sbatch would be told something else than the script says."""
    options = re.findall(r"^#SBATCH --([a-z0-9-]+)", text, re.MULTILINE)
    decided = {"SBATCH_" + option.upper().replace("-", "_") for option in options}
    # Not every variable is called after its option.
    others = {"SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_OPEN_MODE"}
    return decided | others


def _environment(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The caller's environment without what would override the script or tie the job to one that we run in."""
    decided = decided_by(text)
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in decided and (not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_JWT"))
    }
    return {**kept, **environment}
