"""Run directories and runs on this machine: recorded, found again, outliving their command, ended whole."""

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import local_runs
import pytest
from local_runs import ended

from launcher.common import processes
from launcher.errors import UsageError
from launcher.runs import find, record, states
from launcher.slurm import client
from launcher.submit import sbatch, start


@pytest.fixture
def plan(home, tmp_path):
    return lambda does, **ask: local_runs.job_that(does, tmp_path, **ask)


@pytest.fixture(autouse=True)
def nothing_is_left(home):
    yield
    root = home / "state" / "mixlaunch" / "runs"
    for path in root.glob("*"):
        processes.stop(lambda path=path: processes.marked(**{states.MARK: str(path)}), grace=1)


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_on_this_machine_is_recorded_and_ends(plan):
    run = start.run(plan("exit 0"), asked=["tiny"])
    assert run.path.name.startswith("tiny-")
    assert ended(run).state == "COMPLETED"
    again = record.read(run.path)
    assert (again.job, again.cluster, again.is_local, again.job_ids) == ("tiny", "local", True, [run.job_id])
    assert again.record["asked"] == ["tiny"]
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.yaml",
        "job.sbatch",
        "logs",
        "run.json",
        "submitit",
    ]


def test_its_exit_code_is_kept(plan):
    state = ended(start.run(plan("exit 2")))
    assert (state.state, state.exit_code, state.source) == ("FAILED", 2, "logs")


def test_it_outlives_the_command_and_its_terminal(plan, tmp_path):
    """Started from a process that is then killed with its whole group; its output isn't the command's."""
    (tmp_path / "plan").write_bytes(
        pickle.dumps(plan("cd $MIXLAUNCH_RUN; until [ -e go ]; do sleep 0.1; done; touch late"))
    )
    code = (
        "import pickle, sys, time\nfrom pathlib import Path\nfrom launcher.submit import start\n"
        "print(start.run(pickle.loads(Path(sys.argv[1]).read_bytes())).path, flush=True)\ntime.sleep(60)"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "plan")]
    command = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True)
    run = record.read(Path(command.stdout.readline().strip()))
    os.killpg(command.pid, signal.SIGHUP)
    assert command.communicate(timeout=20) == ("", None)  # the pipe is closed: nobody else holds it
    assert states.of_run(run).state == "RUNNING"
    (run.path / "go").touch()
    assert ended(run).state == "COMPLETED"
    assert (run.path / "late").exists()


def test_a_command_that_is_told_to_end_takes_it_along(plan, tmp_path):
    (tmp_path / "plan").write_bytes(pickle.dumps(plan("touch $MIXLAUNCH_RUN/ready; sleep 300")))
    code = (
        "import pickle, sys\nfrom pathlib import Path\nfrom launcher.cli import run_job\n"
        "plan = pickle.loads(Path(sys.argv[1]).read_bytes())\n"
        "sys.exit(run_job.submit(plan, asked=(), wait=None, follow=False))"
    )
    argv = [sys.executable, "-c", code, str(tmp_path / "plan")]
    command = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.rglob("ready")))
    command.terminate()
    assert "cancelled" in command.communicate(timeout=20)[0]
    assert command.returncode == 130
    (ready,) = tmp_path.rglob("ready")
    assert states.of_run(record.read(ready.parent)).state == "CANCELLED"


def test_cancel_ends_every_process_of_it(plan, monkeypatch):
    monkeypatch.setattr(states, "FAREWELL", 2)  # the one that left its session doesn't hear of the end by itself
    run = start.run(plan("setsid sleep 300 & touch $MIXLAUNCH_RUN/ready; exec sleep 300"))
    until((run.path / "ready").exists)
    assert states.cancel(run)
    assert not states.is_running(run.path)
    assert states.of_run(record.read(run.path)).state == "CANCELLED"
    assert not states.cancel(record.read(run.path))


def test_a_killed_run_says_so(plan):
    run = start.run(plan("touch $MIXLAUNCH_RUN/ready; sleep 300"))
    until((run.path / "ready").exists)
    processes.stop(lambda: processes.marked(**{states.MARK: str(run.path)}), grace=0, first=signal.SIGKILL)
    state = states.of_run(run)
    assert (state.state, state.exit_code) == ("FAILED", None)
    assert "killed" in state.reason


def test_the_time_limit_warns_then_ends(plan, monkeypatch):
    """Two seconds, with the warning one second before."""
    made = plan("exec sleep 300")
    monkeypatch.setattr(client, "seconds", lambda limit: 2)
    run = start.run(dataclasses.replace(made, profile=made.profile.model_copy(update={"signal_lead": 1})))
    state = ended(run)
    assert state.state == "FAILED"
    assert "signal USR2, passed on" in (run.path / "logs/attempt_0/batch.log").read_text()
    until(lambda: not states.is_running(run.path))


def test_runs_are_found_by_name_id_prefix_and_age(plan):
    made = [start.run(plan("exit 0", name=name)) for name in ("first", "second", "second")]
    roots = [made[0].path.parent]
    assert find.run("newest", roots).path in {run.path for run in made}
    assert find.run(made[0].name, roots).path == made[0].path
    assert find.run(made[2].job_id, roots).path == made[2].path
    assert find.run("second", roots).path in {made[1].path, made[2].path}
    assert find.run(str(made[1].path), []).path == made[1].path
    assert {run.path for run in find.every([*roots, *roots])} == {run.path for run in made}
    with pytest.raises(UsageError, match=r"no run 'secnod'; nearest: second-"):
        find.run("secnod", roots)
    for run in made:
        ended(run)


def test_what_is_no_run_is_named(plan, tmp_path):
    with pytest.raises(UsageError, match="there are no runs in"):
        find.run("newest", [tmp_path / "nowhere"])
    with pytest.raises(UsageError, match=r"not a run directory \(it has no run.json\)"):
        find.run(str(tmp_path), [])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.json").write_text(json.dumps({"schema": 99}))
    with pytest.raises(UsageError, match="schema 99, this mixlaunch reads 1; update it"):
        find.run(str(tmp_path / "new"), [])
    assert find.every([tmp_path]) == []


def test_no_two_runs_share_a_folder(plan):
    assert len({start.new_path(plan("exit 0")) for _ in range(50)}) > 45


def test_a_run_of_another_machine_isnt_judged_by_ours(plan):
    run = start.run(plan("exit 0"))
    ended(run)
    elsewhere = states.of_local(run.path, "another-host")
    assert elsewhere.state == "COMPLETED"  # its log says so
    (run.path / "logs/attempt_0/batch.log").unlink()
    assert states.of_local(run.path, "another-host").state == "UNKNOWN"
    assert states.of_local(run.path, "another-host").active


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("90", 5400),
        ("01:30", 90),
        ("2:00:00", 7200),
        ("1-0", 86400),
        ("1-02", 93600),
        ("1-02:03", 93780),
        ("1-02:03:04", 93784),
    ],
)
def test_time_limits_are_read_as_slurm_reads_them(limit, expected):
    assert client.seconds(limit) == expected


def test_variables_that_would_override_the_script_are_left_out(monkeypatch):
    for name in ("SBATCH_PARTITION", "SBATCH_ACCOUNT", "SBATCH_TIMELIMIT", "SLURM_JOB_ID", "SLURM_CONF", "OTHER"):
        monkeypatch.setenv(name, "x")
    kept = sbatch._environment(
        "#!/bin/bash\n#SBATCH --partition=a\n#SBATCH --time=5\n", os.environ, {"SLURM_CONF": "/b"}
    )
    assert "SBATCH_PARTITION" not in kept
    assert "SBATCH_TIMELIMIT" not in kept
    assert "SLURM_JOB_ID" not in kept
    assert (kept["SBATCH_ACCOUNT"], kept["OTHER"], kept["SLURM_CONF"]) == ("x", "x", "/b")
