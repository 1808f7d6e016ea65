"""A job of this machine: our script in a process that outlives us, by submitit's local executor."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from submitit import helpers
from submitit.local import local

from launcher.common import files, processes
from launcher.planning.plan import JobPlan
from launcher.runs.states import MARK
from launcher.slurm import client
from megatron_mixtral.spec import rundir


def submit(plan: JobPlan, text: str, run_dir: Path, *, caller: Mapping[str, str]) -> str:
    """Start `text` as `run_dir`'s next job, in the environment `caller`; its process is its id."""
    seconds, lead = client.seconds(plan.time), plan.profile.signal_lead
    executor = DetachedExecutor(run_dir, text, caller, seconds=seconds, lead=lead)
    return executor.submit(helpers.CommandFunction(["bash", str(run_dir / rundir.SCRIPT)])).job_id


class DetachedExecutor(local.LocalExecutor):
    """submitit's local executor; its controller has a session of its own and runs our script unchanged."""

    def __init__(self, run_dir: Path, text: str, caller: Mapping[str, str], *, seconds: int, lead: int) -> None:
        (run_dir / "submitit").mkdir(exist_ok=True)
        super().__init__(run_dir / "submitit")
        self._run_dir = run_dir
        self._text = text
        self._caller = caller
        self._seconds = seconds
        self._lead = lead

    def _submit_command(self, command: str) -> local.LocalJob[Any]:
        script = self._run_dir / rundir.SCRIPT
        files.write(script, self._text)
        environment = {
            **self._caller,
            MARK: str(self._run_dir),
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_NTASKS": "1",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_COMMAND": f"bash {rundir.SCRIPT}",
            "SUBMITIT_LOCAL_TIMEOUT_S": str(self._seconds),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(self._lead),
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
        }
        argv = [sys.executable, "-m", "submitit.local._local", str(self.folder)]
        pid = processes.start(argv, env=environment, cwd=self._run_dir, log=self.folder / "controller.log")
        return local.LocalJob(folder=self.folder, job_id=str(pid))
