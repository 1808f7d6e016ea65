"""The script's own decisions, on this machine: what an exit code leads to, what signals do, what is left behind.

Real bash and real processes; only the ranks' Python is replaced, by a shell script that does what a test says.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.cluster import profile
from launcher.common import processes
from launcher.planning import jobs
from launcher.script import lint, render

WAIT = 40


class Running:
    """A script under way."""

    def __init__(self, run: Path, act: str, *, ranks: int, resumable: bool, interpreter: str) -> None:
        self.run = run
        python = run.parent / "python"
        python.write_text(f"#!{interpreter}\n{act}\n")
        python.chmod(0o755)
        local = profile.load("local").model_copy(update={"python": str(python)})
        axes = jobs.Axes(pipeline=ranks)
        plan = (
            jobs.plan_finetune(local, model="/m", axes=axes, values={"global_batch": ranks})
            if resumable
            else jobs.plan_tiny(local, output="/x")
        )
        text = render.render(plan, str(run))
        lint.check(text)
        script = run.parent / "job.sbatch"
        script.write_text(text)
        self.process = subprocess.Popen(["bash", str(script)], cwd="/", stdout=subprocess.DEVNULL)

    def ended(self) -> int:
        """Exit code of the script; a moment later nothing of the run is alive."""
        code = self.process.wait(timeout=WAIT)
        assert processes.wait(lambda: processes.marked(MIXLAUNCH_RUN=str(self.run)), 2) == []
        return code

    def until(self, name: str) -> None:
        """Wait for a file that the ranks make."""
        end = time.monotonic() + WAIT
        while not (self.run / name).exists():
            assert time.monotonic() < end, f"{name} never came"
            time.sleep(0.05)

    def log(self, name: str = "batch", attempt: int = 0) -> str:
        return (self.run / "logs" / f"attempt_{attempt}" / f"{name}.log").read_text()

    def attempts(self) -> int:
        return len(list((self.run / "logs").glob("attempt_*")))


@pytest.fixture
def start(tmp_path):
    started = []

    def start(act: str, *, ranks: int = 1, resumable: bool = True, interpreter: str = "/bin/bash") -> Running:
        running = Running(tmp_path / "run", act, ranks=ranks, resumable=resumable, interpreter=interpreter)
        started.append(running)
        return running

    yield start
    for running in started:
        processes.stop(lambda run=running.run: processes.marked(MIXLAUNCH_RUN=str(run)), grace=1)
        running.process.kill()
        running.process.wait()


CHECKPOINT = (
    'mkdir -p "$MIXLAUNCH_RUN/checkpoints/iter_{0}" && touch "$MIXLAUNCH_RUN/checkpoints/iter_{0}/mixlaunch.json"'
)


def test_every_rank_gets_its_place_and_its_log(start):
    act = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MIXLAUNCH_ATTEMPT $*"; echo "$MASTER_PORT" >&2'
    script = start(act, ranks=2)
    assert script.ended() == 0
    for rank in (0, 1):
        said, port = script.log(f"rank_{rank}").splitlines()
        words = f"{rank} {rank} 2 127.0.0.1 0 -P -m megatron_mixtral finetune --config {script.run}/config.yaml"
        assert said == words
        assert 10_000 <= int(port) < 32_768
    assert script.log().endswith("mixlaunch: done; exit 0\n")


def test_the_configuration_is_written_once(start):
    script = start('cat "$MIXLAUNCH_RUN/config.yaml"')
    assert script.ended() == 0
    assert "model: /m" in script.log("rank_0")


def test_a_mistake_is_never_retried(start):
    script = start("exit 2")
    assert script.ended() == 2
    assert script.attempts() == 1


def test_saved_is_started_again_until_done(start):
    script = start('[ "$MIXLAUNCH_ATTEMPT" -eq 2 ] || exit 85')
    assert script.ended() == 0
    assert script.attempts() == 3
    assert "everything is saved; starting again" in script.log(attempt=1)


def test_three_faults_in_one_place_are_the_end(start):
    script = start("exit 7")
    assert script.ended() == 7
    assert script.attempts() == 3
    assert "3 faults without a newer checkpoint than none; exit 7" in script.log(attempt=2)


@pytest.mark.parametrize(("said", "ends"), [(7, 7), (85, 1)])
def test_a_failure_that_a_full_disk_keeps_from_being_told_is_one(start, said, ends):
    script = start(f': >"$MIXLAUNCH_LOGS/first_exit"; exit {said}')
    assert script.ended() == ends
    assert script.attempts() == 3
    assert f"3 faults without a newer checkpoint than none; exit {ends}" in script.log(attempt=2)


def test_faults_that_cannot_be_counted_are_the_end(start):
    script = start('mkdir "$MIXLAUNCH_RUN/faults"; exit 7')
    assert script.ended() == 7
    assert script.attempts() == 1
    assert "faults can't be counted" in script.log()


def test_faults_with_progress_between_them_go_on(start):
    act = f'[ "$MIXLAUNCH_ATTEMPT" -lt 4 ] || exit 0\n{CHECKPOINT.format("000000$MIXLAUNCH_ATTEMPT")}\nexit 9'
    script = start(act)
    assert script.ended() == 0
    assert script.attempts() == 5


def test_an_unfinished_checkpoint_is_no_progress(start):
    script = start('mkdir -p "$MIXLAUNCH_RUN/checkpoints/iter_000000$MIXLAUNCH_ATTEMPT"; exit 9')
    assert script.ended() == 9
    assert script.attempts() == 3


def test_a_job_that_cannot_resume_is_not_retried(start):
    script = start("exit 7", resumable=False)
    assert script.ended() == 7
    assert script.attempts() == 1


def test_one_ranks_failure_ends_the_others_and_names_itself(start):
    script = start('[ "$RANK" -eq 1 ] && exit 2; sleep 60', ranks=2)
    begun = time.monotonic()
    assert script.ended() == 2
    assert time.monotonic() - begun < 15
    code, rank, node = (script.run / "logs" / "attempt_0" / "first_exit").read_text().split()
    assert (code, rank, node) == ("2", "1", os.uname().nodename)


def test_a_rank_that_will_not_leave_is_killed(start):
    act = '[ "$RANK" -eq 1 ] && { while [ ! -e "$MIXLAUNCH_RUN/deaf" ]; do sleep 0.05; done; exit 2; }\n'
    act += 'trap "" TERM; touch "$MIXLAUNCH_RUN/deaf"; sleep 60 & wait; sleep 60'
    script = start(act, ranks=2)
    assert script.ended() == 2


def test_a_rank_killed_from_outside_is_a_fault(start):
    script = start('[ "$MIXLAUNCH_ATTEMPT" -gt 0 ] || kill -KILL $$')
    assert script.ended() == 0
    assert "rank 0 on" in script.log()
    assert "137" in script.log()


def test_ranks_that_saved_may_take_their_time_to_leave(start):
    # The first to leave with 85 isn't a failure: nobody is killed in the middle of something.
    act = '[ "$MIXLAUNCH_ATTEMPT" -eq 0 ] || exit 0; [ "$RANK" -eq 0 ] && exit 85\n'
    act += 'sleep 2; touch "$MIXLAUNCH_RUN/whole"; exit 85'
    script = start(act, ranks=2)
    assert script.ended() == 0
    assert (script.run / "whole").exists()


def test_the_early_warning_reaches_every_rank(start):
    # As Python does it: a shell can't take up a signal that it was born to ignore.
    act = """
import os, pathlib, signal, sys, time
run, rank = pathlib.Path(os.environ["MIXLAUNCH_RUN"]), os.environ["RANK"]
if os.environ["MIXLAUNCH_ATTEMPT"] != "0":
    sys.exit(0)
signal.signal(signal.SIGUSR2, lambda *_: ((run / f"warned_{rank}").touch(), sys.exit(85)))
(run / f"up_{rank}").touch()
time.sleep(60)
"""
    script = start(act, ranks=2, interpreter=sys.executable)
    script.until("up_0")
    script.until("up_1")
    script.process.send_signal(signal.SIGUSR2)
    assert script.ended() == 0
    assert (script.run / "warned_0").exists()
    assert (script.run / "warned_1").exists()
    assert "signal USR2, passed on to the ranks" in script.log()
    assert script.attempts() == 2


def test_a_warning_before_a_rank_listens_kills_nobody(start):
    # Python imports for minutes before it takes signals up; there is nothing to save yet.
    script = start('touch "$MIXLAUNCH_RUN/up"; for i in {1..10}; do sleep 0.1; done')
    script.until("up")
    script.process.send_signal(signal.SIGUSR2)
    assert script.ended() == 0
    assert script.attempts() == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_it_ends_and_leaves_nothing(start, signum):
    script = start('touch "$MIXLAUNCH_RUN/up_$RANK"; sleep 60 & sleep 60', ranks=2)
    script.until("up_0")
    script.until("up_1")
    script.process.send_signal(signum)
    assert script.ended() != 0
    assert script.attempts() == 1
    assert "told to end" in script.log()


def test_told_to_end_it_has_the_time_to_save_or_to_answer(start):
    script = start(
        'trap \'sleep 11; touch "$MIXLAUNCH_RUN/whole"; exit 0\' TERM; touch "$MIXLAUNCH_RUN/up"; sleep 60 & wait'
    )
    script.until("up")
    script.process.send_signal(signal.SIGTERM)
    assert script.ended() == 143
    assert (script.run / "whole").exists()


def test_secrets_reach_the_ranks_and_nothing_else(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "secrets.env").write_text("TOKEN='ca na$ry'\n")
    script = start("[ \"$TOKEN\" = 'ca na$ry' ] || exit 3")
    assert script.ended() == 0
    assert "ry" not in script.log()


def test_a_key_is_made_once_and_only_its_owner_reads_it(tmp_path):
    run = tmp_path / "run"
    plan = jobs.plan_serve(
        profile.load("local").model_copy(update={"python": "/bin/true"}), model="/m", host="0.0.0.0"
    )
    script = tmp_path / "job.sbatch"
    script.write_text(render.render(plan, str(run)))
    subprocess.run(["bash", script], check=True, stdout=subprocess.DEVNULL)
    secrets = run / "secrets.env"
    assert secrets.stat().st_mode & 0o777 == 0o600
    name, key = secrets.read_text().strip().split("=")
    assert (name, len(key)) == ("MIXLAUNCH_API_KEY", 48)
    subprocess.run(["bash", script], check=True, stdout=subprocess.DEVNULL)
    assert secrets.read_text() == f"{name}={key}\n"
    assert key not in "".join(p.read_text() for p in run.rglob("*") if p.is_file() and p != secrets)


def test_a_run_directory_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    script = tmp_path / "job.sbatch"
    script.write_text(
        render.render(jobs.plan_tiny(profile.load("local"), output="/x"), str(tmp_path / "file" / "run"))
    )
    assert subprocess.run(["bash", script], capture_output=True, check=False).returncode == 1
