"""Living with runs on a real Slurm: what they do, why they end, how they go on, with accounts and without."""

import contextlib
import dataclasses
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import pytest
from click.testing import CliRunner
from running import wait_until

from launcher.cli import explain as explain_command
from launcher.cli.main import cli
from launcher.cluster import bad_nodes
from launcher.common import processes
from launcher.diagnose import explain
from launcher.errors import Fault, SubmitError, UncertainError, UsageError
from launcher.host.local import Local
from launcher.planning import jobs
from launcher.runs import logs, record, states
from launcher.slurm import client, hostlist
from launcher.submit import answer, resume, start

WAITS = 'echo "rank $RANK of attempt $MIXLAUNCH_ATTEMPT"; exec sleep 300'


@pytest.fixture
def mixlaunch(cluster, monkeypatch, tmp_path):
    """A command typed by somebody whose default cluster this is; what it printed."""
    path = tmp_path / "site.yaml"
    path.write_text(json.dumps(cluster.model_dump(mode="json", exclude_none=True)))
    monkeypatch.setenv("MIXLAUNCH_CLUSTER", str(path))

    def typed(*argv: str, code: int = 0) -> str:
        done = CliRunner().invoke(cli, list(argv))
        assert done.exit_code == code, f"{argv}: {done.exit_code}\n{done.output}\n{done.exception!r}"
        return done.output

    return typed


@pytest.fixture
def once(plan, cluster):
    """A plan that isn't tried again, of jobs so small that many run at once."""

    def make(python: str, **more) -> jobs.JobPlan:
        node = cluster.node.model_copy(update={"gpus": 2, "cpus": 8, "memory_gb": 16})
        return dataclasses.replace(plan(python, **({"node": node} | more)), resumable=False)

    return make


def running(run, ranks: int = 4) -> bool:
    """Whether every rank of the newest attempt has said its word."""
    there = logs.attempts(run.path)
    spoken = (
        [path for path in logs.path(run.path, there[-1]).parent.glob("rank_*") if path.read_text()] if there else []
    )
    return len(spoken) == ranks


# --- from the queue to the next attempt ---------------------------------------------------------------------------


def test_from_the_queue_to_the_next_attempt(plan, stub, finish, mixlaunch, site, tmp_path):
    """A run waits, runs, loses a node, comes back, is cancelled, and goes on without that node."""
    blocker = start.run(plan(stub(WAITS), nodes=4, exclusive=True))
    wait_until(lambda: running(blocker, 8), run=blocker)
    run = start.run(plan(stub(WAITS)))

    def status() -> dict:
        [told] = json.loads(mixlaunch("status", run.name, "--json"))
        return told

    waiting = wait_until(lambda: (told := status())["starts"] and told, 30, run)
    assert (waiting["state"], waiting["reason"]) == ("PENDING", "Resources")
    assert waiting["reason_in_words"] == "next in line, waits for nodes to become free"
    assert "starts about" in mixlaunch("status")
    assert "hasn't started: next in line" in mixlaunch("explain", run.name)

    mixlaunch("cancel", blocker.name)
    wait_until(lambda: running(run), 60, run)
    told = status()
    first, second = told["nodes"]
    assert (told["state"], told["attempt"]) == ("RUNNING", 0)
    assert 500 < told["time_left_s"] <= 600
    assert "no sign of trouble" in mixlaunch("explain", run.name)
    assert "is RUNNING as job" in mixlaunch("resume", run.name, code=2)
    elsewhere = states.of_slurm({run.path: run.job_id}, without_accounts(site, tmp_path))[run.path]
    assert (elsewhere.state, elsewhere.source) == ("RUNNING", "slurm")
    assert hostlist.expand(elsewhere.nodes) == [first, second]

    with down(site, second):
        wait_until(lambda: logs.attempts(run.path) == [0, 1] and running(run), 60, run)
    assert sorted(mixlaunch("logs", run.name, "--rank", "all", "--grep", "attempt 1").splitlines()) == [
        f"[{rank}] rank {rank} of attempt 1" for rank in range(4)
    ]
    lost = json.loads(mixlaunch("explain", run.name, "--json"))
    assert (lost["verdict"], lost["earlier"][0]["cause"]) == ("running", "node_failure")
    assert list(lost["bad_nodes"]) == [second]
    mixlaunch("explain", run.name, "--mark-bad", "--for", "2h")
    [entry] = json.loads(mixlaunch("nodes", "--json"))
    assert (entry["node"], entry["reason"]) == (second, f"a node failed in {run.name}")

    mixlaunch("cancel", run.name)
    assert finish(run).state == "CANCELLED"
    assert json.loads(mixlaunch("explain", run.name, "--json"))["verdict"] == "cancelled"
    assert "was cancelled, it didn't fail" in mixlaunch("retry", run.name, code=2)
    mixlaunch("resume", run.name, "--time", "7", "--exclude", first)
    resumed = record.read(run.path)
    assert resumed.job_ids == [run.job_id, resumed.job_id]
    assert [entry["how"] for entry in resumed.record["resubmissions"]] == ["resume"]
    shown = site.host.call("scontrol", "--oneliner", "show", "job", resumed.job_id)
    assert f" ExcNodeList={hostlist.compress([first, second])} " in shown
    assert " TimeLimit=00:07:00 " in shown
    wait_until(lambda: logs.attempts(run.path) == [0, 1, 2] and running(run), 60, run)
    assert not {first, second} & set(status()["nodes"])


def without_accounts(site, tmp_path) -> Local:
    """The same cluster as one sees it where there is no slurmdbd."""
    text = site.slurm_conf.read_text()
    kept = [line for line in text.splitlines() if not line.startswith(("AccountingStorage", "JobAcctGather"))]
    path = tmp_path / "slurm.conf"
    path.write_text("\n".join([*kept, "AccountingStorageType=accounting_storage/none", ""]))
    return Local(str(path))


@contextlib.contextmanager
def down(site, node: str):
    """A node that its administrator takes down, and gives back."""

    def is_back() -> bool:
        with contextlib.suppress(Fault):  # refused while it is on its way
            site.host.call("scontrol", "update", f"NodeName={node}", "State=IDLE")
        state = site.host.call("sinfo", "-h", "-N", "-n", node, "-o", "%T").split()[0]
        return state in ("idle", "mixed", "allocated", "completing")

    site.host.call("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=fan")
    try:
        yield
    finally:
        wait_until(is_back, 30)


# --- why they end -------------------------------------------------------------------------------------------------

FAIL = {  # what one rank of four does, and what `explain` makes of it
    "killed": '[ "$RANK" = 2 ] && kill -9 $$; sleep 60',
    "crashed": '[ "$RANK" = 2 ] && kill -SEGV $$; sleep 60',
    "mistake": '[ "$RANK" = 2 ] && { echo "error: no such data" >&2; exit 2; }; sleep 60',
    "disk_full": '[ "$RANK" = 2 ] && { echo x >/dev/full || exit 1; }; sleep 60',
    "exception": '[ "$RANK" = 2 ] && { echo "ValueError: rope_theta" >&2; exit 1; }; sleep 60',
}


def test_why_runs_failed(once, stub, finish, site):
    """Several at once, two ranks a node: real ends, each with the rank and the node that began it."""
    started = {cause: start.run(once(stub(does))) for cause, does in FAIL.items()}
    started["no_python"] = start.run(once("/nowhere/python"))
    started["cancelled"] = start.run(once(stub(WAITS)))
    wait_until(lambda: running(started["cancelled"]), 30)
    states.cancel(started["cancelled"])
    for cause, run in started.items():
        finish(run)
        told = explain_command.as_dict(explain.explain(run))
        assert (told["verdict"], told["cause"]) == ("cancelled" if cause == "cancelled" else "failed", cause), told
        assert told["bad_nodes"] == {}
        assert told["lines"]
        assert told["advice"]
        if cause == "killed":  # once Slurm has forgotten the job, its logs tell
            forgotten = states.of_slurm({run.path: "1"}, site.host)[run.path]
            assert (forgotten.state, forgotten.exit_code, forgotten.source) == ("FAILED", 137, "logs")
        if cause in FAIL:
            second = logs.path(run.path, 0, logs.BATCH).read_text().split("rank 2 on ")[1].split()[0]
            assert (told["rank"], told["nodes"]) == (2, [second])


def test_a_node_is_only_blamed_with_reason(once, stub, finish, mixlaunch):
    run = start.run(once(stub(FAIL["exception"])))
    finish(run)
    assert "nothing in it speaks against a node" in mixlaunch("explain", run.name, "--mark-bad", code=2)
    assert mixlaunch("nodes", "--json") == "[]\n"
    assert "sandbox7: no node of" in mixlaunch("nodes", "add", "sandbox7", "--reason", "x", code=2)
    tried = mixlaunch("retry", run.name, "--exclude-failed")
    [node] = explain.explain(run, attempt=0).finding.nodes
    assert f"without  {node}\n" in tried
    assert f"#SBATCH --exclude={node}\n" in (run.path / "job.sbatch").read_text()


def test_a_run_of_this_machine_is_explained_and_tried_again(tmp_path, monkeypatch, stub):
    monkeypatch.delenv("MIXLAUNCH_CLUSTER", raising=False)

    def typed(*argv: str) -> str:
        return CliRunner().invoke(cli, list(argv)).output

    monkeypatch.setenv("MIXLAUNCH_PYTHON", stub('[ "$MIXLAUNCH_ATTEMPT" = 1 ] || { echo "MemoryError"; exit 1; }'))
    typed("tiny", "--output", str(tmp_path / "m"))
    told = json.loads(typed("explain", "--json"))
    assert (told["cause"], told["rank"], told["attempt"]) == ("host_memory", 0, 0)
    assert not any("--mark-bad" in advice or "sacct" in advice for advice in told["advice"])
    assert "saves nothing to resume from" in typed("resume", told["name"])
    assert "done" in typed("retry", told["name"], "--wait")
    assert "is done; there is nothing to retry" in typed("retry", told["name"])


# --- another try is a submission like any other -------------------------------------------------------------------


@pytest.fixture
def failed(once, stub, finish):
    """A run that failed, and would again."""
    run = start.run(once(stub("exit 7")))
    assert finish(run).exit_code == 7
    (run.path / "faults").write_text("none 3\n")
    return record.read(run.path)


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Put a script in sbatch's place; the real one is "$SBATCH"."""
    monkeypatch.setenv("SBATCH", str(processes.which("sbatch")))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def replace(does: str) -> None:
        (tmp_path / "bin" / "sbatch").write_text(f"#!/bin/bash\n{does}\n")
        (tmp_path / "bin" / "sbatch").chmod(0o755)

    return replace


def jobs_of(site, run) -> list[str]:
    queue = client.queue(site.host).values()
    return sorted((job.id for job in queue if job.command == str(run.path / "job.sbatch")), key=int)


def files(run) -> dict:
    return {path.name: path.read_text() for path in run.path.iterdir() if path.is_file()}


def test_a_refused_try_leaves_the_run_as_it_was(failed, sbatch, site):
    before = files(failed)
    sbatch('echo "sbatch: error: invalid partition specified" >&2; exit 1')
    with pytest.raises(SubmitError, match=r"(?s)invalid partition.*Nothing was submitted"):
        resume.retry(failed, exclude=["sandbox3"], time="5")
    assert files(failed) == before
    assert jobs_of(site, failed) == failed.job_ids


def test_garbage_from_sbatch_isnt_taken_for_the_job_before(failed, sbatch, site, finish):
    sbatch("echo gibberish")
    with pytest.raises(SubmitError, match=r"(?s)gibberish.*Nothing was submitted"):
        resume.retry(failed)
    sbatch('"$SBATCH" "$@" >/dev/null; echo gibberish')
    tried = resume.retry(failed)
    assert jobs_of(site, failed) == tried.job_ids
    assert len(tried.job_ids) == 2
    assert finish(tried).exit_code == 7
    assert (failed.path / "faults").read_text() == "- 0\n"  # it may fail three times again


def test_a_job_that_nobody_heard_of_is_adopted(failed, sbatch, site, monkeypatch):
    """sbatch hangs after it made the job, and then Slurm doesn't answer."""
    monkeypatch.setattr(answer, "SBATCH_TIMEOUT", 2)
    sbatch('"$SBATCH" --hold "$@"; exec >/dev/null 2>&1; sleep 30')
    with monkeypatch.context() as silent:
        silent.setattr(states, "find_job", lambda *_: (_ for _ in ()).throw(Fault("squeue: no answer")))
        with pytest.raises(UncertainError, match="isn't known"):
            resume.retry(failed)
        assert states.of_run(record.read(failed.path)).state == states.SUBMITTING
        with pytest.raises(Fault, match="no answer"):
            resume.retry(failed)
    assert states.of_run(record.read(failed.path)).state == "PENDING"
    assert record.read(failed.path).job_ids == jobs_of(site, failed)
    with pytest.raises(UsageError, match="is PENDING as job"):
        resume.retry(failed)


def test_of_two_at_once_one_goes_on(failed, sbatch, site):
    sbatch('sleep 1; "$SBATCH" --hold "$@"')
    ends = []

    def retry():
        try:
            ends.append(resume.retry(failed).job_id)
        except UsageError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=retry) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [end for end in ends if "another command is continuing it" in end or "is PENDING" in end]
    assert len(refused) == 2, ends
    assert jobs_of(site, failed) == record.read(failed.path).job_ids
    assert len(jobs_of(site, failed)) == 2


RETRY = """
import pathlib, sys
from launcher.runs import record
from launcher.runs import states
from launcher.submit import start
from launcher.submit import resume
resume.retry(record.read(pathlib.Path(sys.argv[1])))
"""


@pytest.mark.parametrize(("does", "made"), [('sleep 2; exec "$SBATCH" --hold "$@"', 2), ("sleep 2; exit 1", 1)])
def test_ctrl_c_in_the_middle_of_another_try(failed, sbatch, site, tmp_path, does, made):
    before = files(failed)
    sbatch(f"touch {tmp_path}/submitting; {does}")
    process = subprocess.Popen(
        [sys.executable, "-c", RETRY, str(failed.path)], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_until((tmp_path / "submitting").exists, 20)
    os.killpg(process.pid, signal.SIGINT)
    _, complaint = process.communicate(timeout=30)
    assert jobs_of(site, failed) == record.read(failed.path).job_ids
    assert len(jobs_of(site, failed)) == made
    assert ("Slurm has the job" in complaint) == (made == 2)
    assert made == 2 or files(failed) == before


# --- watching -----------------------------------------------------------------------------------------------------


def test_watching_tells_news_until_the_end(once, stub, mixlaunch):
    """Off a terminal: a line whenever there is something new, no colour, and an end of its own."""
    run = start.run(once(stub("sleep 4")))
    lines = [json.loads(line) for line in mixlaunch("status", run.name, "--watch", "--json").splitlines()]
    assert lines[-1]["state"] == "COMPLETED"
    assert [line["state"] for line in lines].count("COMPLETED") == 1
    [told] = mixlaunch("status", run.name, "--watch").splitlines()
    assert told.split()[1:] == [run.name, "COMPLETED"]


def test_on_a_terminal_the_table_is_redrawn_in_place_until_ctrl_c(once, stub, mixlaunch):
    run = start.run(once(stub("sleep 60")))
    wait_until(lambda: states.of_run(run).state == "RUNNING", 30, run)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher", "status", "--watch"]
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment | {"TERM": "xterm", "COLUMNS": "120"}
    )
    os.close(theirs)
    seen = read_until(ours, lambda text: text.count("RUNNING") >= 2, 30)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    os.close(ours)
    assert "\x1b[1A" in seen  # up again, over what was drawn
    assert "\x1b[36mRUNNING" in seen
    assert "1 running" in seen


def read_until(terminal: int, condition, seconds: float) -> str:
    text, deadline = "", time.monotonic() + seconds
    while not condition(text):
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 0.2)[0]:
            text += os.read(terminal, 65_536).decode(errors="replace")
    return text


# --- health -------------------------------------------------------------------------------------------------------


def test_a_node_that_isnt_fit_is_named_and_left_out(plan, stub, finish, site):
    """On its second node no file can be written: the check says so, and the job comes back on other nodes."""
    sick = '[ "$MIXLAUNCH_ATTEMPT$SLURM_PROCID" != 01 ] || ulimit -f 0'
    python = stub(f'case "$*" in *.health*) {sick}; exec {sys.executable} "$@";; esac; echo "rank $RANK"')
    run = start.run(plan(python, health_check=True))
    assert finish(run, 120).state == "COMPLETED"
    assert logs.attempts(run.path) == [0, 1]
    fit, bad = (logs.path(run.path, 0).parent / "health" / "nodes").read_text().split()
    said = logs.path(run.path, 0, logs.BATCH).read_text()
    assert f"health check: {bad} is bad: the run directory can't be written: File too large" in said
    assert f"{fit} is bad" not in said
    assert "every node is fit" in logs.path(run.path, 1, logs.BATCH).read_text()
    assert not logs.ranks(run.path, 0)  # none started
    [event] = [event for event in logs.events(run.path) if event["event"] == "unhealthy"]
    assert event["node"] == bad
    shown = site.host.call("scontrol", "--oneliner", "show", "job", run.job_id)
    assert f" ExcNodeList={bad} " in shown
    told = explain.explain(run)
    assert (told.verdict, list(told.bad_nodes)) == ("finished", [bad])


def test_a_check_that_fails_everywhere_blames_no_node(once, stub, finish):
    run = start.run(once(stub("echo no torch here >&2; exit 1"), health_check=True))
    assert finish(run).state == "FAILED"
    told = explain_command.as_dict(explain.explain(run))
    assert (told["cause"], told["bad_nodes"]) == ("health_check_failed", {})
    assert "no torch here" in told["lines"][0]["text"]
    assert logs.attempts(run.path) == [0]


def test_the_list_is_left_out_of_every_submission(once, stub, cluster, site):
    bad_nodes.add(cluster, {"sandbox2": "slow", "sandbox3": "slow"}, bad_nodes.duration("1h"))
    run = start.run(once(stub("sleep 20")))
    state = wait_until(lambda: (state := states.of_run(run)).nodes and state, 30, run)
    assert state.nodes == "sandbox[0-1]"
    bad_nodes.add(cluster, {"sandbox7": "sold"}, None)
    with pytest.raises(
        SubmitError, match=r"(?s)Invalid node name.*It excludes \"sandbox\[2-3,7\]\"; `mixlaunch nodes`"
    ):
        start.run(once(stub("exit 0")))
