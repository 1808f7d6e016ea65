"""From a script to a job of this machine's Slurm, through submitit: sbatch gets our text verbatim."""

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit import helpers
from submitit.core import core
from submitit.slurm import slurm

from launcher.common import files, processes
from launcher.errors import SubmitError
from launcher.host.base import Host
from launcher.host.local import Local
from launcher.planning.plan import JobPlan
from launcher.submit import answer
from megatron_mixtral.spec import rundir

GRACE = 15


def submit(plan: JobPlan, text: str, run_dir: Path, *, host: Local, caller: Mapping[str, str]) -> str:
    """Submit `text` as `run_dir`'s next job from the environment `caller`, and return its id."""
    host.require_conf()
    executor = VerbatimExecutor(plan, text, run_dir, host, caller)
    # submitit records this as the job's function: running the script by hand.
    return executor.submit(helpers.CommandFunction(["bash", str(run_dir / rundir.SCRIPT)])).job_id


class VerbatimExecutor(slurm.SlurmExecutor):
    """submitit's Slurm executor with our script in place of its own."""

    def __init__(self, plan: JobPlan, text: str, run_dir: Path, host: Local, caller: Mapping[str, str]) -> None:
        for program in ("sbatch", "srun"):
            if processes.which(program) is None:
                raise SubmitError(f"{program}: not found on PATH; submit from a login node of the cluster")
        (run_dir / "submitit").mkdir(exist_ok=True)
        super().__init__(run_dir / "submitit")
        self._plan, self._text, self._script, self._host = plan, text, run_dir / rundir.SCRIPT, host
        self._variables = _environment(text, caller, host.environment)

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        return self._text

    def _num_tasks(self) -> int:
        return self._plan.world

    def _submit_command(self, command: str) -> core.Job[Any]:
        files.write(self._script, self._make_submission_file_text(command, ""))
        sbatch, *rest = self._make_submission_command(self._script)
        argv = [sbatch, *self._plan.queue_options, *rest]
        job_id = _sbatch(argv, self._script, self._variables, self._host)
        return self.job_class(folder=self.folder, job_id=job_id, tasks=list(range(self._num_tasks())))


def _sbatch(argv: list[str], script: Path, variables: Mapping[str, str], host: Host) -> str:
    """Run sbatch once with these variables, to its end, and return the job's id."""
    process = subprocess.Popen(
        argv,
        env=variables,
        cwd=script.parent,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches only us: sbatch must finish with a job or without one
    )
    was_interrupted = False
    try:
        output, complaint = process.communicate(timeout=answer.SBATCH_TIMEOUT)
    except KeyboardInterrupt:
        was_interrupted = True
        output, complaint = _finish(process)
    except subprocess.TimeoutExpired:
        output, complaint = _kill(process)
        complaint = f"no answer within {answer.SBATCH_TIMEOUT} s. {complaint}".strip()
    job_id = answer.job_of(process.returncode, output, complaint, script, host)
    if was_interrupted:
        raise answer.interrupted(job_id)
    return job_id


def _finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    try:
        return process.communicate(timeout=GRACE)
    except subprocess.TimeoutExpired:
        return _kill(process)


def _kill(process: "subprocess.Popen[str]") -> tuple[str, str]:
    process.kill()
    return process.communicate()


def _environment(text: str, caller: Mapping[str, str], environment: Mapping[str, str]) -> dict[str, str]:
    """`caller` without what would override the script or tie the job to one that we run in."""
    decided = answer.decided_by(text)
    kept = {
        name: value
        for name, value in caller.items()
        if name not in decided and (not name.startswith("SLURM_") or name in ("SLURM_CONF", "SLURM_JWT"))
    }
    return {**kept, **environment}
