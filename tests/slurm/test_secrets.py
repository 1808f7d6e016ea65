"""Secrets on the real Slurm: the ranks have them, and nothing that anybody else can look at holds their values."""

import os
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from running import wait_until

from launcher.cli.main import cli
from launcher.planning import jobs, secrets
from launcher.runs import find, record
from launcher.script import render
from launcher.submit import start

CANARY = "ca'na\"ry-$(touch canary)-`touch canary`-\\-漢字"
TOLD = 'printf %s "$TOKEN" >"$MIXLAUNCH_RUN/told.$RANK"; until [ -e "$MIXLAUNCH_RUN/go" ]; do sleep 0.1; done; env'
MEANT = ("secrets.env", "told.0", "told.1", "told.2", "told.3")


def leaks(*folders: Path) -> list[Path]:
    """Files that hold the secret, quoted or not, but for those that are meant to."""
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return [p for p in files if p.name not in MEANT and b"$(touch canary)-" in p.read_bytes()]


def ended(run: Path) -> bool:
    log = run / "logs" / "attempt_0" / "batch.log"
    return log.exists() and any(word in log.read_text() for word in ("; exit ", "wasn't set"))


def seen_from_outside(run: record.Run) -> str:
    """What Slurm and the system tell anybody about a running job."""
    told = [
        run.host.call("scontrol", "show", "job", "--details", "--details", run.job_id),
        run.host.call("scontrol", "write", "batch_script", run.job_id, "-"),
        run.host.call("squeue", "--format=%all"),
        subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout,
    ]
    return "\n".join(told)


@pytest.fixture
def submitted(plan, cluster, stub, monkeypatch):
    """A run under way, every rank of which has read its secret."""

    def begin(**more) -> record.Run:
        monkeypatch.setenv("TOKEN", CANARY)
        rank = TOLD.replace("; env", "; env | grep -v ^TOKEN=")
        run = start.run(plan(stub(rank), secrets=("TOKEN",), **more))
        wait_until(lambda: len(list(run.path.glob("told.*"))) == 4, 40, run)
        return run

    return begin


def test_a_secret_reaches_every_rank_and_nothing_else(submitted, finish, site, tmp_path):
    run = submitted()
    shown = seen_from_outside(run)
    assert "job.sbatch" in shown
    assert "touch canary" not in shown
    assert leaks(run.path, tmp_path / "runs", site.folder) == []
    (run.path / "go").touch()
    assert finish(run).state == "COMPLETED"
    assert {p.read_text() for p in run.path.glob("told.*")} == {CANARY}
    assert (run.path / "secrets.env").stat().st_mode & 0o777 == 0o600
    assert leaks(run.path, tmp_path / "runs", site.folder) == []
    assert not list(tmp_path.rglob("canary"))
    if site.accounting:
        fields = "JobName,Comment,AdminComment,SubmitLine,WorkDir,Reason"
        told = run.host.call("sacct", "-j", run.job_id, f"--format={fields}", "-P")
        assert "touch canary" not in told


def test_an_exported_script_takes_them_from_sbatch_s_environment(plan, stub, site, tmp_path, monkeypatch):
    text = render.render(plan(stub(TOLD.split(";")[0]), secrets=("TOKEN",)))
    assert "touch canary" not in text
    (tmp_path / "job.sbatch").write_text(text)

    def submit(**more: str) -> Path:
        environment = {**os.environ, **site.host.environment, **more}
        done = subprocess.run(
            ["sbatch", "job.sbatch"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        run = tmp_path / "runs" / f"finetune-{done.stdout.split()[3]}"
        wait_until(lambda: ended(run), 60)
        return run

    run = submit(TOKEN=CANARY)
    assert {p.read_text() for p in run.glob("told.*")} == {CANARY}
    assert (run / "secrets.env").stat().st_mode & 0o777 == 0o600
    assert leaks(run) == []
    monkeypatch.delenv("TOKEN", raising=False)
    without = submit()
    said = (without / "logs/attempt_0/batch.log").read_text()
    assert "the secret TOKEN wasn't set where this was submitted" in said
    assert not (without / "secrets.env").exists()
    assert not list(without.glob("told.*"))


def test_the_command_line_takes_a_name_and_shows_no_value(cluster, tmp_path, monkeypatch, stub, finish):
    words = cluster.model_dump(mode="json", exclude_none=True) | {
        "python": stub('printf %s "$OTHER" >"$MIXLAUNCH_RUN/told.0"')
    }
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(words))
    (tmp_path / "text.txt").write_text("words\n")
    monkeypatch.setenv("OTHER", CANARY)
    asked = ["prepare", str(tmp_path / "text.txt"), "--model", str(tmp_path / "models/m"), "--cluster", str(path)]
    dry = CliRunner().invoke(cli, [*asked, "--env", "OTHER", "--dry-run"])
    assert dry.exit_code == 0, dry.output
    assert "OTHER" in dry.output
    assert "touch canary" not in dry.output
    started = CliRunner().invoke(cli, [*asked, "--env", "OTHER"])
    assert started.exit_code == 0, started.output
    run = find.every([tmp_path / "runs"])[0]
    assert finish(run).state == "COMPLETED"
    assert (run.path / "told.0").read_text() == CANARY
    assert run.record["secrets"] == ["OTHER"]
    assert leaks(tmp_path) == []


def test_jobs_that_are_started_know_them_without_being_asked(monkeypatch, cluster):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    assert secrets.carried(jobs.plan_download(cluster)) == ("HF_TOKEN",)
    assert secrets.carried(jobs.plan_tiny(cluster, output="/x")) == ()
