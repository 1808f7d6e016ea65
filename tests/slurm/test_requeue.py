"""What the batch script decides on the host of a real Slurm: requeue, give up, pass signals on, end."""

import sys

from running import rank_logs, wait_until

from launcher.common import processes
from launcher.diagnose import explain
from launcher.runs import logs, states
from launcher.submit import start

# In Python: the script starts ranks with USR2 ignored, and a shell can't listen to what it found ignored.
LISTEN = """
import os, signal, sys, time
heard = []
if os.environ["MIXLAUNCH_ATTEMPT"] == "0":
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, lambda number, frame: heard.append(number))
    print("ready", flush=True)
    while not heard:
        time.sleep(0.1)
    time.sleep(0.5)  # a save; Slurm and the script may both send the signal
    print(signal.Signals(heard[0]).name, flush=True)
    sys.exit(85)
"""
COUNT = 'echo "rank $RANK attempt $MIXLAUNCH_ATTEMPT restart ${SLURM_RESTART_COUNT:-0}"'
SAVE = (
    'at="$MIXLAUNCH_RUN/checkpoints/iter_000000$MIXLAUNCH_ATTEMPT"; mkdir -p "$at"; echo {} >"$at/mixlaunch.json"'
)


def batch_log(run, attempt=0) -> str:
    return logs.path(run.path, attempt, "batch").read_text()


def test_85_is_requeued_and_the_log_goes_on_in_the_next_attempt(plan, stub, finish):
    run = start.run(plan(stub(f'{COUNT}; [ "$MIXLAUNCH_ATTEMPT" = 1 ] || exit 85')))
    read = list(logs.follow(run.path, active=lambda: states.of_run(run).active))
    assert read == ["rank 0 attempt 0 restart 0", "rank 0 attempt 1 restart 1"]
    assert finish(run).state == "COMPLETED"
    assert logs.attempts(run.path) == [0, 1]
    assert "everything is saved; requeued" in batch_log(run, 0)
    assert batch_log(run, 1).rstrip().endswith("done; exit 0")


def test_a_users_mistake_is_never_retried(plan, stub, finish):
    run = start.run(plan(stub(f'{COUNT}; [ "$RANK" = 2 ] && exit 2; sleep 30')))
    state = finish(run)
    assert (state.state, state.exit_code) == ("FAILED", 2)
    assert logs.attempts(run.path) == [0]
    assert "rank 2 on sandbox1 was the first to leave, with 2" in batch_log(run)


def test_faults_are_retried_while_there_is_progress_and_thrice_without(plan, stub, finish):
    """The second attempt saves and fails, the next two fail at the same place: four in all."""
    save_once = f'[ "$MIXLAUNCH_ATTEMPT" != 1 ] || {{ {SAVE}; }}'
    others_wait = '[ "$RANK" = 0 ] || exec sleep 60'  # or their failure ends rank 0 before it has saved
    run = start.run(plan(stub(f"{COUNT}; {others_wait}; {save_once}; exit 1"), nodes=1))
    state = finish(run, 120)
    assert (state.state, state.exit_code) == ("FAILED", 1)
    assert logs.attempts(run.path) == [0, 1, 2, 3]
    assert "fault 1 with none" in batch_log(run, 0)
    assert "fault 1 with iter_0000001" in batch_log(run, 1)
    assert "3 faults without a newer checkpoint than iter_0000001; exit 1" in batch_log(run, 3)


def test_the_early_warning_reaches_every_rank(plan, stub, finish):
    """As Slurm sends it before the time limit: to the batch script alone, which passes it on."""
    run = start.run(plan(stub(LISTEN, sys.executable)))
    wait_until(lambda: _all_ready(run), run=run)
    run.host.call("scancel", "--signal=USR2", "--batch", run.job_id)
    assert finish(run).state == "COMPLETED"
    assert rank_logs(run) == ["ready\nSIGUSR2\n"] * 4
    assert "signal USR2, passed on" in batch_log(run)


def test_the_time_limit_warns_before_it_ends(plan, stub, finish, cluster):
    """Not our scancel but Slurm's own: a limit of one minute with its warning at once."""
    run = start.run(plan(stub(LISTEN, sys.executable), limit="1", signal_lead=55, nodes=1))
    wait_until(lambda: _all_ready(run, 2), run=run)
    assert finish(run, 90).state == "COMPLETED"
    assert rank_logs(run) == ["ready\nSIGUSR2\n"] * 2


def test_cancelled_means_ended_even_when_the_ranks_ask_for_more(plan, stub, finish):
    run = start.run(plan(stub(LISTEN, sys.executable)))
    wait_until(lambda: _all_ready(run), run=run)
    assert states.cancel(run)
    assert finish(run).state == "CANCELLED"
    assert not states.cancel(run)
    assert logs.attempts(run.path) == [0]
    assert "everything is saved, but the job was ended from outside" in batch_log(run)


def test_a_preempted_job_saves_in_its_grace_time_and_comes_back(plan, stub, finish, site):
    """A job of the partition `high` takes all nodes from one of `low`, whose ranks are told with SIGTERM."""
    made = plan(stub(LISTEN, sys.executable), partition="low", exclusive=True, nodes=4)
    run = start.run(made)
    wait_until(lambda: _all_ready(run, 8), run=run)
    urgent = plan(stub("sleep 1"), partition="high", exclusive=True, nodes=4)
    other = start.run(urgent)
    assert finish(other).state == "COMPLETED"
    assert finish(run, 120).state == "COMPLETED"
    assert rank_logs(run) == ["ready\nSIGTERM\n"] * 8
    assert len(logs.attempts(run.path)) == 2
    [told] = explain.explain(run).earlier
    assert told.cause.name == "preempted"


def test_every_process_of_a_failed_job_is_gone(plan, stub, finish):
    run = start.run(plan(stub('[ "$RANK" = 1 ] && exit 2; exec sleep 300')))
    assert finish(run).state == "FAILED"
    wait_until(lambda: not processes.marked(SLURM_JOB_ID=run.job_id), 15, run)


def _all_ready(run, ranks: int = 4) -> bool:
    ready = [path for path in (run.path / "logs" / "attempt_0").glob("rank_*.log") if "ready" in path.read_text()]
    return len(ready) == ranks
