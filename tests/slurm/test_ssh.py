"""Submission from a laptop: the commands that a user types there, a real sshd, and the real Slurm behind it.

The laptop has no Slurm on its PATH, and touching the cluster's folders otherwise than over ssh is an error.
"""

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import sshd
import yaml
from running import wait_until

from launcher import processes, runs, slurm, ssh, tunnel

pytestmark = pytest.mark.skipif(not sshd.find() or not shutil.which("rsync"), reason="needs openssh-server, rsync")

# What the laptop's Python refuses: everything below the cluster's folder, as if it weren't there.
AWAY = """
import os, sys
far = os.environ["TEST_FAR_AWAY"]
def refuse(path):
    if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(far):
        raise AssertionError(f"the laptop touched {path}")
def hook(event, arguments):
    if event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.remove", "os.rename", "os.rmdir"):
        refuse(arguments[0])
sys.addaudithook(hook)
stat = os.stat
os.stat = lambda path, *a, **k: (refuse(path), stat(path, *a, **k))[1]
from launcher.cli import main
main()
"""
PROGRAMS = ("ssh", "rsync", "bash")
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
HOSTILE = "a b'c\"d;$(touch {canary})`touch {canary}`|&<>*?[x]{{y}}~#!\\\\é%j"


@dataclass
class Screen:
    """What a terminal shows."""

    descriptor: int

    def until(self, text: str, seconds: float = 20) -> str:
        shown, deadline = "", time.monotonic() + seconds
        while text not in shown:
            assert select.select([self.descriptor], [], [], max(0, deadline - time.monotonic()))[0], shown
            shown += os.read(self.descriptor, 4096).decode()
        return shown

    def types(self, line: str) -> None:
        os.write(self.descriptor, f"{line}\n".encode())


class Laptop:
    """A home with a profile of the cluster behind `server`, and the commands typed there."""

    def __init__(self, home: Path, server: sshd.Server, far: Path, slurm_conf: Path) -> None:
        self.home, self.server, self.far = home, server, far
        self.bin = home / "bin"
        self.bin.mkdir(parents=True)
        for program in PROGRAMS:
            (self.bin / program).symlink_to(shutil.which(program))
        self.profile = {
            "scheduler": "slurm",
            "slurm_conf": str(slurm_conf),
            "time": "10",
            "node": {"gpus": 2, "cpus": 64, "memory_gb": 512},
            "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            "paths": {name: str(far / name) for name in ("models", "data", "runs")},
            "signal_lead": 30,
            "login": {"host": "127.0.0.1", "options": server.options},
        }
        self.environment = {
            "PATH": str(self.bin),
            "HOME": str(home),
            "XDG_STATE_HOME": str(home / "state"),
            "MIXLAUNCH_CLUSTERS": str(home / "clusters"),
            "MIXLAUNCH_CLUSTER": "far",
            "TEST_FAR_AWAY": str(far),
            "TERM": "dumb",
        }
        self.change()

    def change(self, **more) -> None:
        """Write the profile, with `more` in it."""
        self.profile |= more
        (self.home / "clusters").mkdir(exist_ok=True)
        (self.home / "clusters" / "far.yaml").write_text(yaml.safe_dump(self.profile))

    def start(self, *words: str) -> subprocess.Popen:
        argv, pipe = [sys.executable, "-c", AWAY, *words], subprocess.PIPE
        how = {"cwd": self.home, "env": self.environment, "stdin": subprocess.DEVNULL, "text": True}
        return subprocess.Popen(argv, stdout=pipe, stderr=pipe, **how)

    @contextlib.contextmanager
    def terminal(self, *words: str):
        """A command on a terminal of its own."""
        pid, descriptor = pty.fork()
        if pid == 0:
            os.chdir(self.home)
            os.execve(sys.executable, [sys.executable, "-c", AWAY, *words], self.environment)
        try:
            yield Screen(descriptor)
        finally:
            os.close(descriptor)
            os.waitpid(pid, 0)

    def types(self, *words: str, code: int = 0, seconds: float = 60) -> str:
        """What `mixlaunch WORDS` prints; it ends with `code`."""
        process = self.start(*words)
        out, err = process.communicate(timeout=seconds)
        assert process.returncode == code, f"{' '.join(words)} ended with {process.returncode}\n{out}{err}"
        assert "Traceback" not in err
        return out + err

    def trains(self, *more: str, **how) -> str:
        """Submit a finetune of two ranks on one node."""
        return self.types(*self.training, *more, **how)

    @property
    def training(self) -> tuple[str, ...]:
        return ("finetune", "--model", f"{self.far}/models/m", "--pp", "1", "--ep", "2")

    def copies(self) -> list[Path]:
        """Run directories that this laptop knows of."""
        return [path.parent for path in (self.home / "state").rglob("run.json")]

    def there(self) -> list[runs.Run]:
        """The runs as they are on the cluster, newest first."""
        return runs.every([self.far / "runs"])


@pytest.fixture
def far(tmp_path):
    """The cluster's shared folder."""
    folder = tmp_path / "cluster"
    for name in ("models/m", "data", "home", "bin"):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "finetune.idx").touch()
    return folder


@pytest.fixture
def server(tmp_path, far):
    """Over there PATH has a folder of the test's own first, and no start-up file of this machine's user counts."""
    variables = {"HOME": str(far / "home"), "PATH": f"{far / 'bin'}:{os.environ['PATH']}"}
    with sshd.running(tmp_path / "sshd", variables) as running:
        yield running


@pytest.fixture
def laptop(tmp_path, server, far, site, stub, monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    made = Laptop(tmp_path / "laptop", server, far, site.slurm_conf)
    made.change(python=stub("echo rank $RANK"))
    yield made
    with contextlib.suppress(ssh.Fault):
        ssh.close(server.login)


def jobs_of(site, run: runs.Run) -> list[str]:
    return [job.id for job in slurm.queue(site.environment).values() if job.command == str(run.path / "job.sbatch")]


def test_a_job_lives_its_life_from_a_laptop(laptop, stub, site, tmp_path):
    """Submitted, shown, followed into its second attempt, kept as record and logs; over one connection."""
    laptop.change(
        python=stub('echo "rank $RANK attempt $MIXLAUNCH_ATTEMPT"; exit $((85 - 85 * MIXLAUNCH_ATTEMPT))')
    )
    said = laptop.trains()
    [run] = laptop.there()
    assert re.search(rf"submitted to far as job {run.job_id}\b", said)
    assert f"127.0.0.1:{run.path}" in said
    assert laptop.types("logs", "-f", "finetune").splitlines() == ["rank 0 attempt 0", "rank 0 attempt 1"]
    assert laptop.types("logs", "--rank", "1", "--attempt", "0", run.job_id) == "rank 1 attempt 0\n"
    assert "everything is saved; requeued" in laptop.types("logs", "--batch", "--attempt", "0", run.name)
    assert re.search(rf"^{run.name} .*{run.job_id} .*COMPLETED", laptop.types("status"), re.M)
    assert json.loads(laptop.types("status", "--json", run.name))[0]["path"] == f"127.0.0.1:{run.path}"
    assert "ended already" in laptop.types("cancel", run.name)
    assert laptop.server.connections == 1


def test_a_failed_run_is_explained_and_tried_again(laptop, stub, finish):
    laptop.change(python=stub('echo "no space left"; exit $((2 - 2 * MIXLAUNCH_ATTEMPT))'))
    laptop.trains()
    [run] = laptop.there()
    assert finish(run).exit_code == 2
    assert "no space left" in laptop.types("explain", "finetune")
    replace(laptop, "sbatch", "echo no, not now >&2; exit 1")
    assert "Nothing was submitted" in laptop.types("retry", "finetune", code=1)
    (laptop.far / "bin" / "sbatch").unlink()
    assert "as job" in laptop.types("retry", "finetune")
    [run] = laptop.there()
    assert len(run.job_ids) == 2
    assert finish(run).state == "COMPLETED"
    assert laptop.types("logs") == "no space left\n"
    assert re.search(rf"{run.job_id} .*COMPLETED", laptop.types("status"))


def configure(laptop: Laptop, text: str) -> None:
    """Give the laptop's user a configuration of ssh, which by itself looks in the real home only."""
    (laptop.home / "config").write_text(text)
    (laptop.bin / "ssh").unlink()
    (laptop.bin / "ssh").write_text(f'#!/bin/bash\nexec {shutil.which("ssh")} -F {laptop.home}/config "$@"\n')
    (laptop.bin / "ssh").chmod(0o755)


def test_the_users_own_configuration_is_used_where_it_helps(laptop):
    """An alias, and a shared connection of his own; but not what would turn our commands into something else."""
    path = f"/tmp/mixlaunch-test-{os.getpid()}"
    settings = {
        **laptop.server.options,
        "HostName": "127.0.0.1",
        "ControlMaster": "auto",
        "ControlPath": path,
        "ControlPersist": "60",
        "RemoteCommand": "echo no",
        "RequestTTY": "force",
        "LocalForward": f"127.0.0.1:{laptop.server.port} localhost:22",  # taken, as his other window has it
        "ExitOnForwardFailure": "yes",
    }
    configure(laptop, "Host mine\n" + "".join(f"  {name} {value}\n" for name, value in settings.items()))
    laptop.change(login={"host": "mine"})
    try:
        laptop.trains()
        assert re.search(r"^finetune-\S+ ", laptop.types("status"), re.M)
        assert laptop.server.connections == 1
        assert Path(path).is_socket()
    finally:
        subprocess.run([str(laptop.bin / "ssh"), "-O", "exit", "mine"], capture_output=True)


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


def test_a_passphrase_is_asked_for_once_and_only_on_a_terminal(laptop):
    key = laptop.server.folder / "key"
    subprocess.run(["ssh-keygen", "-q", "-p", "-P", "", "-N", "open sesame", "-f", str(key)], check=True)
    assert "Permission denied" in laptop.types("status", "--cluster", "far", code=1)
    with laptop.terminal("status", "--cluster", "far") as screen:
        assert "Enter passphrase" in screen.until("passphrase")
        screen.types("open sesame")
        assert "no runs yet" in screen.until("no runs yet")
    assert "no runs yet" in laptop.types("status", "--cluster", "far")
    assert laptop.server.connections == 1


def replace(laptop: Laptop, program: str, does: str) -> None:
    """Put a script in a program's place on the login node; the real one is "$REAL"."""
    path = laptop.far / "bin" / program
    path.write_text(f"#!/bin/bash\nREAL={shutil.which(program)}\n{does}\n")
    path.chmod(0o755)


# Ends the connection that it runs under, as a network or a laptop's lid does.
CUT = """
pid=$$
while :; do
  case $(cat /proc/$pid/comm) in sshd*) break ;; esac
  pid=$(sed 's/.*) [A-Z] //' /proc/$pid/stat | cut -d' ' -f1)
done
kill -KILL "$pid"
sleep 0.3"""


def test_hostile_values_arrive_and_run_nothing(laptop, stub, tmp_path, site, finish):
    canary = tmp_path / "canary"
    hostile = HOSTILE.format(canary=canary)
    folder = laptop.far / "r '$(touch canary)`touch canary`;&é"
    (folder / "models" / "m x").mkdir(parents=True)
    laptop.change(
        python=stub('printf "%s\\n" "$HOSTILE"'),
        comment=hostile.replace("\\", ""),
        environment={**laptop.profile["environment"], "HOSTILE": hostile},
        paths={**laptop.profile["paths"], "runs": str(folder)},
    )
    laptop.types("finetune", "--model", f"{folder}/models/m x", "--pp", "1", "--ep", "1")
    [run] = runs.every([folder])
    assert finish(run).state == "COMPLETED"
    assert laptop.types("logs") == f"{hostile}\n"
    kept = slurm.call("scontrol", "show", "job", run.job_id, environment=site.environment)
    assert hostile.replace("\\", "") in kept
    assert run.job_id in laptop.types("status")
    assert not list(tmp_path.rglob("canary"))
    assert not (laptop.home / "canary").exists()


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
        (changed_host, r"(?s)login node 127.0.0.1: .*verification failed.*isn't the one"),
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


def test_a_mistake_is_known_before_anything_is_written(laptop):
    config = {"num_hidden_layers": 4, "num_local_experts": 6, "num_attention_heads": 4, "intermediate_size": 64}
    more = {"hidden_size": 64, "vocab_size": 32000, "num_experts_per_tok": 2}
    (laptop.far / "models" / "m" / "config.json").write_text(json.dumps(config | more))
    model = ("--model", f"{laptop.far}/models/m")
    assert "experts / EP = 6 / 4" in laptop.types("finetune", *model, "--pp", "1", "--ep", "4", code=2)
    said = laptop.types("finetune", "--model", f"{laptop.far}/models/other", "--pp", "1", "--ep", "2", code=2)
    assert f"weights: {laptop.far}/models/other doesn't exist on 127.0.0.1" in said
    assert laptop.server.sessions <= 4  # opening the connection, two looks at shapes, one at inputs
    assert not (laptop.far / "runs").exists()


def test_text_of_the_laptop_is_brought_to_the_job(laptop, stub, finish):
    """The second time only what has changed travels."""
    hub = laptop.far / "models" / "small"
    hub.mkdir()
    text = laptop.home / "my chats.jsonl"
    text.write_text('{"text": "one"}\n')
    inputs = "import sys, yaml; print(open(yaml.safe_load(open(sys.argv[-1]))['inputs'][0]).read(), end='')"
    laptop.change(python=stub(inputs, sys.executable))
    for words in ("one", "one\\ntwo"):
        text.write_text(f'{{"text": "{words}"}}\n')
        assert f"bringing {text} to 127.0.0.1" in laptop.types("prepare", text.name, "--model", str(hub))
        newest = laptop.there()[0]
        assert finish(newest).state == "COMPLETED"
        assert laptop.types("logs") == text.read_text()
    assert len(list((laptop.far / "data" / "uploads").rglob("*.jsonl"))) == 1
    said = laptop.types("prepare", "absent.jsonl", "--model", str(hub), code=2)
    assert "absent.jsonl doesn't exist on 127.0.0.1" in said
    for option in ("--output", "--data"):
        job = "prepare" if option == "--output" else "finetune"
        files = ["a.jsonl"] if job == "prepare" else []
        said = laptop.types(job, *files, "--model", str(hub), option, "./out", code=2)
        assert f"{option}: './out' starts from a folder of this machine" in said


def test_a_download_runs_on_the_login_node(laptop, stub):
    laptop.environment |= {"HF_TOKEN": "s3cr3t"}
    laptop.change(python=stub('echo "$4 ${#HF_TOKEN}"; cat "${@: -1}"; exit 3'))
    said = laptop.types("download", "me/Model", code=3)
    assert said.startswith("download 6\nrepo: me/Model\n")
    assert f"output: {laptop.far}/models/Model" in said
    assert not laptop.there()
    laptop.change(container={"runtime": "apptainer", "image": "/x.sif"})
    assert "in a container; give --as-job" in laptop.types("download", "me/Model", code=2)


def test_a_pipeline_is_submitted_from_a_laptop(laptop, stub, finish):
    """Each job after those whose output it needs, with text of the laptop's."""
    laptop.change(python=stub("cat $MIXLAUNCH_RUN/config.yaml"))
    (laptop.home / "text.jsonl").write_text('{"text": "one"}\n')
    said = laptop.types("pipeline", "text.jsonl", "--model", "me/Model", "--pp", "1", "--ep", "2")
    found = {run.job: run for run in laptop.there()}
    assert len(laptop.there()) == 5
    assert all(run.job_id in said for run in laptop.there())
    assert f"{laptop.far}/data/uploads/" in str(found["prepare"].record["config"]["inputs"])
    assert finish(found["finetune"]).state == "COMPLETED"


def test_slurm_is_found_where_only_a_login_shell_finds_it(laptop):
    minimal(laptop, os.path.dirname(slurm.which("sbatch")))
    laptop.trains()
    assert re.search(r"finetune-\S+ .*(PENDING|RUNNING|COMPLET)", laptop.types("status"))


def test_plans_need_no_network(laptop):
    laptop.change(login={"host": "nowhere.invalid"})
    (laptop.bin / "ssh").unlink()
    small = ("--nodes", "16")
    assert re.search(r"through +nowhere.invalid", laptop.types("finetune", "--dry-run", *small))
    assert laptop.types("export", "finetune", *small).startswith("#!/bin/bash")


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
    assert not slurm.queue(site.environment) or not jobs_below(site, laptop.far)


def jobs_below(site, folder: Path) -> list[str]:
    return [job.id for job in slurm.queue(site.environment).values() if job.command.startswith(str(folder))]


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
    assert laptop.types("cancel", run.job_id).strip().endswith("is told to end")


def test_secrets_are_their_owners_over_there_and_nowhere_else(laptop, stub, tmp_path, finish):
    """Looked for in what every process was started with, at both ends, while files are copied and sbatch runs."""
    look = f"cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' ' ' >>{tmp_path}/ps"
    replace(laptop, "sbatch", f'{look}; exec "$REAL" "$@"')
    (laptop.bin / "rsync").unlink()
    (laptop.bin / "rsync").write_text(f'#!/bin/bash\nPATH=/usr/bin:/bin\n{look}\nexec rsync "$@"\n')
    (laptop.bin / "rsync").chmod(0o755)
    laptop.environment |= {"CANARY": "s3cr3t-canary"}
    laptop.change(secrets=["CANARY"], python=stub("echo ${#CANARY}"))
    said = laptop.trains()
    [run] = laptop.there()
    assert finish(run).state == "COMPLETED"
    assert laptop.types("logs") == "13\n"
    secrets = run.path / "secrets.env"
    assert secrets.stat().st_mode & 0o777 == 0o600
    assert "s3cr3t" in secrets.read_text()
    assert "rsync" in (tmp_path / "ps").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path != secrets]
    assert not [path for path in files if b"s3cr3t" in path.read_bytes()]
    assert "s3cr3t" not in said


def test_the_status_of_twenty_runs_takes_a_few_round_trips(laptop, finish):
    laptop.trains()
    [run] = laptop.there()
    finish(run)
    for number in range(19):
        copy = run.path.with_name(f"finetune-{number}")
        shutil.copytree(run.path, copy)
        (copy / "run.json").write_text(json.dumps(run.record | {"name": copy.name}))
    laptop.types("status")
    before, began = laptop.server.sessions, time.monotonic()
    table = laptop.types("status")
    seconds = time.monotonic() - began
    assert len(re.findall(r"^finetune-.* COMPLETED", table, re.M)) == 20
    assert laptop.server.sessions - before <= 3  # the copies, squeue, sacct
    assert laptop.server.connections == 1
    assert seconds < 5
    shutil.rmtree(run.path)
    assert run.name not in laptop.types("status")


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


# What `serve` runs on its one rank: says that it is ready, and answers who has its key with one word.
ANSWER = """
import http.server, json, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        known = self.headers["Authorization"] == f"Bearer {os.environ['MIXLAUNCH_API_KEY']}"
        piece = {"choices": [{"delta": {"content": f"heard {asked}" if known else "no key"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"data: {json.dumps(piece)}\\n\\ndata: [DONE]\\n\\n".encode())
server = http.server.HTTPServer(("", 0), Handler)
state = {"host": HOST, "port": server.server_port, "model": "small"}
state["url"] = f"http://{state['host']}:{server.server_port}"
run = os.environ["MIXLAUNCH_RUN"]
open(f"{run}/server.json", "w").write(json.dumps(state))
open(f"{run}/events.jsonl", "a").write(json.dumps({"time": 1, "event": "ready", "url": state["url"]}) + "\\n")
server.serve_forever()
"""


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("socket.gethostname()", id="every interface"),
        pytest.param("'127.0.0.1'", id="loopback", marks=pytest.mark.soak),
    ],
)
def test_a_server_is_asked_through_a_tunnel(laptop, stub, host):
    laptop.change(python=stub(ANSWER.replace("HOST", host), sys.executable))
    process = laptop.start("serve", "--model", f"{laptop.far}/models/m", "--pp", "1", "--tunnel")
    said = ""
    while "here it is" not in said:
        line = process.stdout.readline()
        assert line, process.communicate()
        said += line
    url = re.search(r"here it is (http://127.0.0.1:\d+)", said)[1]
    [run] = laptop.there()
    key = (run.path / "secrets.env").read_text().partition("=")[2].strip()
    body = {"messages": [{"role": "user", "content": "me"}]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
    assert "heard me" in answer.text
    assert laptop.types("chat", "-p", "you there") == "heard you there\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "goes on; the tunnel is closed" in out
    assert key not in said + out + err
    with pytest.raises(httpx.ConnectError):
        httpx.post(f"{url}/v1/chat/completions", json=body)
    assert not [path for path in laptop.home.rglob("*") if path.is_file() and key.encode() in path.read_bytes()]


def test_a_node_that_only_the_login_node_sees_is_reached_through_it(laptop, monkeypatch):
    """As the user's own configuration names it; the way to the login node is the connection that is open."""
    options = "\n".join(f"  {name} {value}" for name, value in laptop.server.options.items())
    configure(laptop, f"Host node1\n  HostName 127.0.0.1\n{options}\n")
    monkeypatch.setenv("PATH", str(laptop.bin), prepend=":")
    node = tunnel.behind(laptop.server.login, "node1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ssh.connect(laptop.server.login)
    ssh.forward(node, port, "localhost", laptop.server.port)
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            assert connection.recv(8).startswith(b"SSH-2.0")
        assert "direct-tcpip" in laptop.server.log or laptop.server.connections == 2
    finally:
        ssh.close(node)
