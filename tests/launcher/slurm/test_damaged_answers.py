"""What Slurm's commands print, damaged on its way: no traceback, and never another job than the one meant."""

import json
import string

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recorded_slurm import NAMES, Recorded

from launcher.cli.main import cli
from launcher.cluster import discover, profile
from launcher.diagnose import profile_check
from launcher.errors import Fault, MixlaunchError
from launcher.host.local import Local
from launcher.planning import jobs
from launcher.runs import logs, record, states
from launcher.slurm import client, inventory
from launcher.submit import start

MARK = "f00dcafe"
MINE = {
    "squeue": "42|RUNNING|gpu[01-02]|2026-01-01T00:00:00|1:00:00|None|",
    "sacct": "42|FAILED|gpu01|Unknown|1:0\n",
}
OTHERS = [
    "7|PENDING||N/A|1:00:00|Priority|/home/ada/train.sh --prompt hello\nworld",
    "8|RUNNING|gpu03|N/A|1:00:00|None|/home/ada/x.sh 42|CANCELLED|||\n42|FAILED||N/A|1:00|None|y",
    "9_[1-4%2]|PENDING||N/A|UNLIMITED|Nodes required for job are DOWN, DRAINED or reserved|(null)",
    "10+1|COMPLETING|a,b[1-2]|N/A|INVALID|None|",
]
NOISE = st.one_of(
    st.sampled_from(
        ["", "\n", "|", "\x00", "CLUSTER: uni\n", "NOTICE: see motd\n", "42|", "=", "gpu", "\u2028", "é"]
    ),
    st.text(string.printable, max_size=12),
)


@st.composite
def damaged(draw, text: str) -> str:
    """`text` cut, with pieces taken out, doubled, or foreign ones put in."""
    for _ in range(draw(st.integers(0, 3))):
        low, high = sorted((draw(st.integers(0, len(text))), draw(st.integers(0, len(text)))))
        change = draw(st.sampled_from(["cut", "out", "twice", "noise", "noise"]))
        if change == "cut":
            text = text[:high]
        elif change == "out":
            text = text[:low] + text[high:]
        elif change == "twice":
            text = text[:high] + text[low:]
        else:
            text = text[:low] + draw(NOISE) + text[low:]
    return text


def queue_text(script: str = "/r/run/job.sbatch", mark: str = MARK) -> str:
    return "".join(f"{mark}{record}{mark}\n" for record in [*OTHERS[:2], MINE["squeue"] + script, *OTHERS[2:]])


def test_any_text_of_a_job_is_its_own():
    found = client.queued(f"NOTICE: 42|x\nCLUSTER: uni\n{queue_text()}bye\n", MARK)
    assert list(found) == ["7", "8", "42", "9_[1-4%2]", "10+1"]
    assert (found["42"].state, found["42"].command, found["42"].nodes) == (
        "RUNNING",
        "/r/run/job.sbatch",
        "gpu[01-02]",
    )
    assert found["7"].command == "/home/ada/train.sh --prompt hello\nworld"
    assert found["9_[1-4%2]"].reason == "Nodes required for job are DOWN, DRAINED or reserved"
    assert client.queued("", MARK) == client.queued("NOTICE\n", MARK) == {}


@pytest.mark.parametrize("text", [f"{MARK}42|RUNNING", f"{MARK}42|RUNNING{MARK}\n", f"{MARK}{MARK}\n"])
def test_a_damaged_job_is_a_fault_and_not_no_job(text):
    with pytest.raises(Fault, match=r"^squeue: "):
        client.queued(text, MARK)


def test_accounts_are_read_beside_notices():
    told = client.accounted("NOTICE: 42|x\n42|CANCELLED by 1000|None assigned|Unknown|0:15\n\nCLUSTER: uni\n")
    assert [(job.id, job.state, job.nodes, job.exit_code) for job in told.values()] == [
        ("42", "CANCELLED", "", "0:15")
    ]
    with pytest.raises(Fault, match="sacct"):
        client.accounted("42|COMPLETED|gpu01\n")


@given(st.data())
@settings(max_examples=700, deadline=None)
def test_damage_makes_no_job(data):
    """A job keeps its id and its state; it may be missing only where the answer is refused."""
    text = data.draw(damaged(queue_text()))
    try:
        found = client.queued(text, MARK)
    except Fault:
        return
    commands = [job.id for job in found.values() if job.command == "/r/run/job.sbatch"]
    assert all("\n" not in job.nodes + job.start + job.time_left + job.reason for job in found.values())
    assert len(commands) <= 1


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_accounts(data):
    try:
        found = client.accounted(data.draw(damaged(f"NOTICE\n{MINE['sacct']}43|PENDING||Unknown|0:0\n")))
    except Fault:
        return
    assert all(job.state.isupper() and job.exit_code for job in found.values())


@given(site=st.sampled_from([name for name in NAMES if name != "old"]), data=st.data())
@settings(max_examples=700, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_site_gives_a_profile_or_words(site, data, tmp_path_factory):
    host = Recorded(site, lambda text: data.draw(damaged(text)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discover, "HERE", host)
        patch.setattr(Local, "call", lambda _, *words, **more: host.call(*words))
        try:
            made = discover.write(None, tmp_path_factory.mktemp("site") / "x.yaml")
            cluster = inventory.ask(host)
        except MixlaunchError:
            return
        for finding in profile_check._of_slurm(profile.read(made), cluster):
            assert finding.why


class Damaged:
    """Slurm's commands on a machine where one's run is job 42."""

    def __init__(self, script: str) -> None:
        self.script, self.damage, self.cancelled = script, str, set()

    def __call__(self, _: Local, program: str, *arguments: str, timeout: float = 0) -> str:
        if program == "scancel":
            self.cancelled |= set(arguments)
            return ""
        if program == "squeue":
            mark = arguments[-1].removeprefix("--format=").partition("%")[0]
            return self.damage(queue_text(self.script, mark))
        if program == "sacct":
            return self.damage(MINE["sacct"])
        if program == "sinfo":
            return self.damage("gpu01|idle|none\ngpu02|down*|Not responding\nmotd\n")
        raise Fault(f"{program}: not here")


@pytest.fixture
def slurm(write_profile, tmp_path, monkeypatch):
    runs = tmp_path / "runs"
    path = write_profile(f"paths: {{models: {tmp_path}/m, data: {tmp_path}/d, runs: {runs}}}")
    monkeypatch.setenv("MIXLAUNCH_CLUSTER", str(path))
    mine = profile.read(path)
    axes = jobs.Axes(tensor=1, pipeline=1, expert=1, expert_tensor=1, context=1)
    plan = jobs.plan_finetune(mine, axes=axes, ask=jobs.Ask(nodes=1), values={"global_batch": 8})
    run = start.create(plan, runs / "run")
    (run.path / "job.sbatch").write_text("")
    log = logs.path(run.path, 1, logs.BATCH)
    log.parent.mkdir(parents=True)
    log.write_text("mixlaunch: attempt 1\n")
    slurm = Damaged(str(run.path / "job.sbatch"))
    monkeypatch.setattr(Local, "call", lambda host, *words, **more: slurm(host, *words, **more))
    return slurm, run


def test_a_run_is_found_by_its_script_among_others(slurm):
    _, run = slurm
    assert states.find_job(run.path / "job.sbatch", Local()) == "42"
    assert states.of_run(run).state == "RUNNING"
    assert json.loads((run.path / "run.json").read_text())["jobs"] == ["42"]


COMMANDS = (
    ("status",),
    ("status", "--json"),
    ("explain",),
    ("explain", "--json"),
    ("logs", "--batch"),
    ("cancel",),
)


@given(command=st.sampled_from(COMMANDS), data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_command_ends_in_a_traceback_or_takes_another_job(slurm, command, data):
    faked, run = slurm
    record.with_job(run, "42")
    faked.damage = lambda text: data.draw(damaged(text))
    done = CliRunner().invoke(cli, [command[0], run.name, *command[1:]])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exc_info
    assert done.exit_code in (0, 1), (done.exit_code, done.output)
    assert faked.cancelled <= {"42"}
