"""Submission to a real Slurm: our text verbatim through submitit, and one job or none whatever sbatch does."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from running import rank_logs, wait_until
from submitit.slurm.slurm import SlurmJob

from launcher.common import processes
from launcher.errors import SubmitError, UncertainError
from launcher.host.local import Local
from launcher.runs import find, record, states
from launcher.script import render
from launcher.slurm import client
from launcher.submit import answer, start


def test_a_job_runs_our_text_on_every_rank(plan, stub, finish, site):
    made = plan(
        stub('echo "$SLURM_PROCID $RANK $LOCAL_RANK $WORLD_SIZE $SLURMD_NODENAME $*"; getent hosts "$MASTER_ADDR"')
    )
    run = start.run(made, asked=["finetune"])
    assert finish(run).state == "COMPLETED"
    text = (run.path / "job.sbatch").read_text()
    assert text == render.render(made, str(run.path))
    kept = site.host.call("scontrol", "write", "batch_script", run.job_id, "-")
    assert kept.rstrip("\n\0") == text.rstrip("\n")
    for rank, log in enumerate(rank_logs(run)):
        procid, told, local, world, _, *argv = log.splitlines()[0].split()
        assert (procid, told, local, world) == (str(rank), str(rank), str(rank % 2), "4")
        assert argv == f"-P -m megatron_mixtral finetune --config {run.path}/config.yaml".split()
        assert log.splitlines()[1]  # the rendezvous address resolves on every node


def test_it_is_a_submitit_job(plan, stub, finish):
    run = start.run(plan(stub("exit 0")))
    assert finish(run).exit_code == 0
    job = SlurmJob(folder=run.path / "submitit", job_id=run.job_id)
    assert job.paths.submitted_pickle.exists()
    assert job.submission().function.command == ["bash", str(run.path / "job.sbatch")]


def test_the_record_says_what_was_asked(plan, stub, finish):
    run = start.run(plan(stub("exit 0")), asked=["finetune", "--cluster", "sandbox"])
    finish(run)
    again = record.read(run.path)
    assert again.record["asked"] == ["finetune", "--cluster", "sandbox"]
    assert (again.job, again.cluster, again.job_ids) == ("finetune", "sandbox", [run.job_id])
    roots = [run.path.parent]
    for reference in (run.name, run.job_id, "finetune", "newest", str(run.path)):
        assert find.run(reference, roots).path == run.path


def test_states_come_without_accounts_too(plan, stub, finish, site):
    run = start.run(plan(stub("exit 0")))
    finish(run)

    def in_the_accounts():  # which hear of it when slurmctld finds the time
        return client.accounting([run.job_id], site.host)[run.job_id].state == "COMPLETED"

    assert wait_until(in_the_accounts, 60, run)
    assert client.queue(site.host)[run.job_id].state == "COMPLETED"


def test_a_silent_slurm_leaves_the_logs_to_tell(plan, stub, finish, tmp_path):
    run = start.run(plan(stub("exit 2")))
    assert finish(run).exit_code == 2
    (tmp_path / "slurm.conf").write_text(
        "ClusterName=x\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=1\nMessageTimeout=2\nSlurmctldTimeout=2\n"
    )
    elsewhere = states.of_slurm({run.path: run.job_id}, Local(str(tmp_path / "slurm.conf")))
    found = elsewhere[run.path]
    assert (found.state, found.exit_code, found.source) == ("FAILED", 2, "logs")


def test_the_environment_of_the_caller_doesnt_override_the_script(plan, stub, finish, monkeypatch):
    """sbatch prefers SBATCH_* variables to directives, and SLURM_* of a surrounding job to both."""
    for name, value in {
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_JOB_NAME": "other",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7",
    }.items():
        monkeypatch.setenv(name, value)
    run = start.run(plan(stub('echo "$SLURM_NTASKS $SLURM_JOB_NAME"')))
    assert finish(run).state == "COMPLETED"
    assert rank_logs(run)[0] == "4 finetune\n"


def test_a_refusal_is_an_error_and_leaves_nothing(plan, stub, site):
    with pytest.raises(SubmitError, match=r"(?s)invalid partition.*Nothing was submitted"):
        start.run(plan(stub("exit 0"), partition="nowhere"))
    assert not list(Path(plan(stub("")).profile.paths.runs).iterdir())


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put a script in sbatch's place; the real one is "$SBATCH"."""
    real = processes.which("sbatch")

    def replace(does: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "sbatch").write_text(f"#!/bin/bash\n{does}\n")
        (folder / "sbatch").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    monkeypatch.setenv("SBATCH", str(real))
    return replace


def jobs_of(site, path) -> list[str]:
    return [job.id for job in client.queue(site.host).values() if job.command == str(path / "job.sbatch")]


def test_garbage_from_sbatch_with_a_job_behind_it_is_that_job(plan, stub, finish, sbatch, site):
    sbatch('"$SBATCH" "$@" >/dev/null; echo gibberish')
    run = start.run(plan(stub("exit 0")))
    assert jobs_of(site, run.path) == [run.job_id]
    assert finish(run).state == "COMPLETED"


def test_garbage_without_a_job_is_an_error(plan, stub, sbatch):
    sbatch("echo gibberish")
    made = plan(stub("exit 0"))
    with pytest.raises(SubmitError, match=r"(?s)gibberish.*Nothing was submitted"):
        start.run(made)
    assert not list(Path(made.profile.paths.runs).iterdir())


def test_a_failure_after_the_job_was_made_is_that_job(plan, stub, finish, sbatch, site):
    """The notorious one: the controller takes the job, and its answer gets lost."""
    sbatch('"$SBATCH" "$@" >/dev/null; echo "sbatch: error: Socket timed out on send/recv operation" >&2; exit 1')
    run = start.run(plan(stub("exit 0")))
    assert jobs_of(site, run.path) == [run.job_id]
    assert finish(run).state == "COMPLETED"


@pytest.mark.parametrize("makes_a_job", [True, False])
def test_a_hanging_sbatch_is_ended(plan, stub, finish, sbatch, site, monkeypatch, makes_a_job):
    monkeypatch.setattr(answer, "SBATCH_TIMEOUT", 2)
    sbatch(('"$SBATCH" "$@"; ' if makes_a_job else "") + "exec >/dev/null 2>&1; sleep 30")
    made = plan(stub("exit 0"))
    began = time.monotonic()
    if makes_a_job:
        run = start.run(made)
        assert jobs_of(site, run.path) == [run.job_id]
        finish(run)
    else:
        with pytest.raises(SubmitError, match=r"(?s)no answer within 2 s.*Nothing was submitted"):
            start.run(made)
    assert time.monotonic() - began < 25


def test_a_missing_sbatch_is_an_error(plan, stub, monkeypatch, tmp_path):
    made = plan(stub("exit 0"))
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        (tmp_path / "bash").symlink_to("/bin/bash")  # the lint needs it
        with pytest.raises(SubmitError, match="sbatch: not found on PATH"):
            start.run(made)
    assert not list(Path(made.profile.paths.runs).iterdir())


def test_a_controller_that_is_down_is_an_error(plan, stub, tmp_path, site):
    """The munge socket answers, the controller's port doesn't."""
    dead = tmp_path / "slurm.conf"
    lines = site.slurm_conf.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("SlurmctldPort", "MessageTimeout"))]
    dead.write_text("\n".join([*kept, "SlurmctldPort=1", "MessageTimeout=2", "SlurmctldTimeout=2"]))
    made = plan(stub("exit 0"), slurm_conf=str(dead))
    with pytest.raises(SubmitError, match=r"(?s)Unable to contact slurm controller.*Nothing was submitted"):
        start.run(made)
    assert not list(Path(made.profile.paths.runs).iterdir())


def test_when_nobody_can_tell_the_run_stays_and_is_adopted_later(plan, stub, finish, sbatch, monkeypatch):
    """sbatch hangs after it made a job, and squeue doesn't answer: only later is the job found."""
    monkeypatch.setattr(answer, "SBATCH_TIMEOUT", 2)
    sbatch('"$SBATCH" "$@"; exec >/dev/null 2>&1; sleep 30')
    made = plan(stub("sleep 1"))
    call = Local.call
    monkeypatch.setattr(Local, "call", lambda host, program, *a, **k: call(host, "false", *a, **k))
    with pytest.raises(UncertainError, match="isn't known"):
        start.run(made)
    [path] = Path(made.profile.paths.runs).iterdir()
    run = record.read(path)
    assert states.of_run(run).state == states.SUBMITTING
    monkeypatch.setattr(Local, "call", call)
    assert finish(run).state == "COMPLETED"
    assert record.read(path).job_id


CTRL_C = """
    import sys
    from pathlib import Path
    from launcher.submit import start
    from launcher.runs import find
    from launcher.runs import states
    from launcher.submit import start
    import pickle
    start.run(pickle.loads(Path(sys.argv[1]).read_bytes()))
"""


@pytest.mark.parametrize(("does", "made"), [('sleep 2; exec "$SBATCH" "$@"', 1), ("sleep 2; exit 1", 0)])
def test_ctrl_c_in_the_middle_of_a_submission(plan, stub, finish, sbatch, site, tmp_path, does, made):
    """sbatch is let finish: the job it made is told, or there is none and nothing stays."""
    asked = plan(stub("sleep 60"))
    (tmp_path / "plan").write_bytes(pickle.dumps(asked))
    sbatch(f"touch {tmp_path}/submitting; {does}")
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(CTRL_C), str(tmp_path / "plan")],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_until((tmp_path / "submitting").exists, 20)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to everyone in the foreground
    _, complaint = process.communicate(timeout=30)
    left = [record.read(path) for path in Path(asked.profile.paths.runs).iterdir()]
    assert len(left) == made
    for run in left:
        assert jobs_of(site, run.path) == [run.job_id]
        assert f"interrupted, but Slurm has the job: {run.job_id}" in complaint
        states.cancel(run)
        assert finish(run).state == "CANCELLED"
