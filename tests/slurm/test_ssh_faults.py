"""What may stand between a laptop and its cluster: keys, hosts, programs, and connections that are lost."""

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import sshd
import yaml
from laptop import CUT, REASON, jobs_of, replace
from running import wait_until

from launcher.common import processes
from launcher.host import ssh
from launcher.slurm import client

pytestmark = pytest.mark.skipif(not sshd.find() or not shutil.which("rsync"), reason=REASON)


POSIX = (
    "sh",
    "bash",
    "cat",
    "mkdir",
    "mv",
    "rm",
    "env",
    "sed",
    "grep",
    "wc",
    "tail",
    "head",
    "sleep",
    "timeout",
    "ls",
)


def test_a_log_is_followed_over_a_connection_that_breaks(laptop, stub):
    laptop.change(python=stub("for n in 1 2 3 4 5 6 7 8; do echo line $n; sleep 0.5; done"))
    laptop.trains()
    process = laptop.start("logs", "-f")
    lines = [process.stdout.readline()]
    for pid in processes.descendants([laptop.server.process.pid]):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    lines += process.stdout.readlines()
    assert process.wait(60) == 0, process.stderr.read()
    assert lines == [f"line {n}\n" for n in range(1, 9)]
    assert laptop.server.connections == 2


def no_key(laptop):
    (laptop.server.folder / "authorized").write_text("")


def changed_host(laptop):
    sshd.know(laptop.server.folder, laptop.server.port, laptop.server.folder / "key.pub")


def unknown_host(laptop):
    (laptop.server.folder / "known").write_text("")


def nobody(laptop):
    laptop.change(login={"host": "127.0.0.1", "options": {**laptop.server.options, "Port": "1"}})


def mute(laptop):
    """Somebody takes the call and never says a word."""
    laptop.silence = socket.create_server(("127.0.0.1", 0))
    options = {**laptop.server.options, "Port": str(laptop.silence.getsockname()[1]), "ConnectTimeout": "2"}
    laptop.change(login={"host": "127.0.0.1", "options": options})


def no_such_host(laptop):
    laptop.change(login={"host": "nowhere.invalid"})


def no_ssh(laptop):
    (laptop.bin / "ssh").unlink()


def no_rsync(laptop):
    (laptop.bin / "rsync").unlink()


def no_rsync_there(laptop):
    replace(laptop, "rsync", 'echo "bash: line 1: rsync: command not found" >&2; exit 127')


def no_slurm_there(laptop):
    minimal(laptop, "")


def no_folder(laptop):
    laptop.change(paths={**laptop.profile["paths"], "runs": "/proc/mixlaunch/runs"})


def greeting(laptop):
    (laptop.far / "home" / ".bashrc").write_text("echo welcome\n")


def minimal(laptop, more: str) -> None:
    """A PATH over there that holds POSIX's commands, rsync and nothing of Slurm; a login shell's has `more`."""
    folder = laptop.far / "posix"
    folder.mkdir()
    for program in (*POSIX, "rsync"):
        (folder / program).symlink_to(shutil.which(program))
    (laptop.far / "home" / ".bashrc").write_text(f"PATH={folder}\n")
    (laptop.far / "home" / ".bash_profile").write_text(f"PATH={folder}:{more}\n")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (no_key, r"login node 127.0.0.1: .*Permission denied \(publickey\).*\n.*without a question"),
        (changed_host, r"(?s)login node 127.0.0.1: .*verification failed.*differs from the one"),
        (unknown_host, r"(?s)login node 127.0.0.1: .*isn't known here: connect once"),
        (nobody, r"login node 127.0.0.1: .*port 1: Connection refused"),
        (mute, r"login node 127.0.0.1: .*timed out.*\n.*does this machine's network reach it"),
        (no_such_host, r"login node nowhere.invalid: .*Could not resolve"),
        (no_ssh, r"ssh: not found on this machine's PATH"),
        (no_rsync, r"rsync: not found on this machine's PATH"),
        (no_rsync_there, r"login node 127.0.0.1: it has no rsync on its PATH"),
        (no_slurm_there, r"sbatch: not found on the PATH of 127.0.0.1"),
        (no_folder, r"run directory 127.0.0.1:/proc/mixlaunch/runs/finetune-.*: mkdir: .*No such file"),
        (greeting, r"login node 127.0.0.1: rsync: .*is your shell clean.*must print nothing"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_stands_in_the_way_is_named_and_nothing_stays(laptop, harm, said):
    harm(laptop)
    began = time.monotonic()
    assert re.search(said, laptop.trains(code=1))
    assert time.monotonic() - began < 25
    assert not laptop.there()
    assert not list((laptop.far / "runs").glob("*"))
    assert not laptop.copies()


def test_slurm_is_found_where_only_a_login_shell_finds_it(laptop):
    minimal(laptop, os.path.dirname(processes.which("sbatch")))
    laptop.trains()
    assert re.search(r"finetune-\S+ .*(PENDING|RUNNING|COMPLET)", laptop.types("status"))


def test_a_connection_lost_while_sbatch_runs_ends_in_the_job(laptop, site, finish):
    """The script over there goes on without us; a second connection reads what it noted."""
    replace(laptop, "sbatch", f'{CUT}; exec "$REAL" "$@"')
    said = laptop.trains()
    [run] = laptop.there()
    assert jobs_of(site, run) == [run.job_id]
    assert f"as job {run.job_id}" in said
    assert laptop.server.connections == 2
    assert finish(run).state == "COMPLETED"


@pytest.mark.soak
def test_a_connection_lost_before_sbatch_refuses_is_a_refusal(laptop, site):
    replace(laptop, "sbatch", f'{CUT}; exec "$REAL" --partition=nowhere "$@"')
    assert re.search(r"(?s)invalid partition.*Nothing was submitted", laptop.trains(code=1))
    assert not list((laptop.far / "runs").iterdir())
    assert not laptop.copies()


def test_a_connection_lost_before_the_submission_began_means_that_it_never_does(laptop, site):
    """The settlement claims the submission, so that what may still be under way finds it claimed."""
    once = laptop.far / "once"
    settled = 'until [ -e "$1" ] || [ ! -e job.sbatch ]; do sleep 0.1; done'
    first = f'[[ "$*" == submission/0-* ]] && [ ! -e {once} ]'
    replace(laptop, "mkdir", f'if {first}; then touch {once}; {CUT}; {settled}; fi; "$REAL" "$@"')
    said = laptop.trains(code=1)
    assert re.search(r"(?s)connection was lost.*Nothing was submitted", said)
    time.sleep(2)
    assert not laptop.there()
    assert not client.queue(site.host) or not jobs_below(site, laptop.far)


def jobs_below(site, folder: Path) -> list[str]:
    return [job.id for job in client.queue(site.host).values() if job.command.startswith(str(folder))]


def test_a_login_node_that_goes_away_leaves_a_run_whose_job_is_found_later(laptop, site, finish):
    server, go = laptop.server, laptop.far / "go"
    replace(
        laptop,
        "sbatch",
        f'kill $(cat {server.folder}/pid); {CUT}; until [ -e {go} ]; do sleep 0.1; done; exec "$REAL" "$@"',
    )
    said = laptop.trains(code=1)
    assert re.search(r"(?s)Whether there is a job isn't known.*`mixlaunch status finetune-\S+` finds it", said)
    assert re.search(r"(?s)SUBMITTING.*warning: .*Connection refused", laptop.types("status"))
    with server.again():
        assert "hasn't ended; nothing was submitted" in laptop.types("retry", "finetune", code=1)
        go.touch()
        wait_until(lambda: jobs_below(site, laptop.far))
        [job] = jobs_below(site, laptop.far)
        assert re.search(rf"^finetune-\S+ .* {job} ", laptop.types("status"), re.M)
    [run] = laptop.there()
    assert run.job_ids == [job]


def test_ctrl_c_while_sbatch_runs_tells_the_job(laptop, stub, site, tmp_path):
    laptop.change(python=stub("exec sleep 60"))
    replace(laptop, "sbatch", f'touch {tmp_path}/began; sleep 1; exec "$REAL" "$@"')
    process = laptop.start(*laptop.training)
    wait_until((tmp_path / "began").exists)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    [run] = laptop.there()
    assert process.returncode == 130
    assert f"Slurm has the job: {run.job_id}" in err
    assert jobs_of(site, run) == [run.job_id]
    assert laptop.types("cancel", run.job_id).strip().endswith("is being cancelled")


def test_one_silent_login_node_hides_no_other_runs(laptop, finish, tmp_path):
    laptop.trains()
    profile = {**laptop.profile, "paths": {**laptop.profile["paths"], "runs": "/nowhere/runs"}}
    profile["login"] = {"host": "127.0.0.1", "options": {**laptop.server.options, "Port": "1"}}
    silent = ssh.Login("127.0.0.1", tuple(sorted(f"{n}={v}" for n, v in profile["login"]["options"].items())))
    (laptop.home / "clusters" / "silent.yaml").write_text(yaml.safe_dump(profile))
    laptop.environment["XDG_STATE_HOME"] = str(laptop.home / "state")
    laptop.types("status", "--cluster", "silent", code=1)
    said = laptop.types("status")
    assert re.search(r"warning: login node 127.0.0.1: .*refused", said)
    assert re.search(r"^finetune-", said, re.M)
    assert silent.host in said
