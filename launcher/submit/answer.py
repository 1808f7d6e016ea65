"""What sbatch's answer means: a job's id, or an error that says whether there is a job."""

import re
from pathlib import Path

from launcher.errors import Fault, Interrupted, SubmitError, UncertainError
from launcher.host.base import Host
from launcher.runs import states

SBATCH_TIMEOUT = 60  # seconds
UNREACHABLE = re.compile(r"\(connect failure\)|[Cc]onnection refused")


def job_of(code: int, output: str, complaint: str, script: Path, host: Host) -> str:
    """Reads sbatch's answer. If it isn't clear, Slurm is asked whether there is a job of this script."""
    match = states.SUBMITTED.search(output)
    if code == 0 and match:
        return match[1]
    said = f"sbatch: {complaint.strip() or output.strip() or f'exit {code}'}"
    if code and UNREACHABLE.search(complaint):
        raise SubmitError(f"{said}\nNothing was submitted.")
    try:
        found = states.find_job(script, host)
    except Fault as fault:
        raise UncertainError(
            f"{said}\nWhether there is a job isn't known, because Slurm doesn't answer ({fault}). "
            f"`mixlaunch status {script.parent.name}` finds it once Slurm does; don't submit again before then."
        ) from fault
    if found is None:
        raise SubmitError(f"{said}\nNothing was submitted.")
    return found


def decided_by(text: str) -> set[str]:
    """Environment variables that would override the script's directives."""
    options = re.findall(r"^#SBATCH --([a-z0-9-]+)", text, re.MULTILINE)
    decided = {"SBATCH_" + option.upper().replace("-", "_") for option in options}
    # Some variables aren't named after their option.
    others = {"SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE", "SBATCH_REQUEUE", "SBATCH_OPEN_MODE"}
    return decided | others


def interrupted(job_id: str) -> Interrupted:
    """The error for a Ctrl-C after the submission."""
    return Interrupted(f"interrupted, but Slurm has the job: {job_id}; `scancel {job_id}` ends it", job_id)
