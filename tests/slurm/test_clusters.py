"""`clusters new` and `clusters check` on the real Slurm: what they write works; what is wrong is found by name."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import sshd
import yaml
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.cluster import profile
from launcher.common import processes
from launcher.diagnose import profile_check
from launcher.host.local import Local
from launcher.sandbox import lifecycle
from launcher.sandbox.config import ClusterShape

RICH = ClusterShape(
    nodes=2,
    gpus=4,
    gpu_type="a100",
    cpus=32,
    memory_gb=256,
    partitions=(("cpu", 1), ("gpu", 1)),
    features=("a100", "ib"),
    accounts=("nlp", "vision"),
    qos=("high", "night"),
)


def mixlaunch(*words: str):
    result = CliRunner().invoke(cli, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


@pytest.fixture
def here(site, monkeypatch):
    """The sandbox as the Slurm that one stands on."""
    for name, value in site.host.environment.items():
        monkeypatch.setenv(name, value)
    return site


def test_a_new_profile_loads_checks_and_submits(here, tmp_path, monkeypatch):
    written = mixlaunch("clusters", "new", "mine")
    assert written.exit_code == 0, written.output
    path = tmp_path / "home" / ".config" / "mixlaunch" / "clusters" / "mine.yaml"
    made = profile.load("mine")
    assert (made.node.gpus, made.node.cpus, made.node.memory_gb) == (8, 64, 512)
    assert (made.partition, made.gpu_request, made.time) == ("low", "gpus-per-node", "1-00:00:00")
    assert made.slurm_conf == os.environ["SLURM_CONF"]
    assert made.account == ("sandbox" if here.accounting else None)
    version = Local().call("sbatch", "--version").split()[1]
    assert version.startswith(made.slurm_version)
    assert "also with GPUs: high" in path.read_text()
    monkeypatch.delenv("SLURM_CONF")  # from here on the profile tells
    checked = mixlaunch("clusters", "check", "mine")
    assert checked.exit_code == 0, checked.output
    assert "failed" not in checked.output
    assert "sbatch --test-only: a node like that could start at" in checked.output
    again = mixlaunch("clusters", "new", "mine")
    assert (again.exit_code, "is there already" in again.output) == (2, True)


def test_a_new_profile_goes_where_it_is_told(here, tmp_path):
    before = (tmp_path / "x.yaml", tmp_path / "sub" / "y.yaml")
    for path in before:
        assert mixlaunch("clusters", "new", "--output", path).exit_code == 0
        assert profile.read(path).partition == "low"
        assert f"clusters check {path}" in path.read_text()
    assert mixlaunch("clusters", "new", "--output", tmp_path / "x.txt").exit_code == 2
    assert mixlaunch("clusters", "new", "../x").exit_code == 2


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """A cluster with accounts, QoS, features, a reservation, and a limit on its partition."""
    folder = tmp_path_factory.mktemp("rich")
    up = lifecycle.up(folder, RICH)
    limits = ("partition=gpu", "MaxTime=8:00:00", "AllowAccounts=nlp")
    up.host.call("scontrol", "update", *limits)
    what = ("starttime=now", "duration=1-00:00:00", "users=root", "nodes=ALL", "flags=ignore_jobs")
    up.host.call("scontrol", "create", "reservation", "reservationname=ours", *what)
    yield up
    lifecycle.down(folder)


@pytest.fixture
def right(rich, tmp_path):
    """A profile of it that is right."""
    for name in ("models", "data", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "image.sif").touch()
    values = {
        "scheduler": "slurm",
        "partition": "gpu",
        "account": "nlp",
        "qos": "high",
        "constraint": "a100&ib",
        "time": "8:00:00",
        "node": {"gpus": 4, "cpus": 32, "memory_gb": 256},
        "container": {"runtime": "apptainer", "image": str(tmp_path / "image.sif")},
        "paths": {name: str(tmp_path / name) for name in ("models", "data", "runs")},
        "slurm_conf": str(rich.slurm_conf),
    }
    if not rich.accounting:
        del values["account"], values["qos"]
    path = tmp_path / "rich.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def found(path, *overrides: str) -> dict[str, profile_check.ProfileFinding]:
    return {finding.what: finding for finding in profile_check.check(profile.read(path, overrides))}


def test_a_right_profile_has_no_fault(right, rich):
    findings = found(right, "reservation=ours")
    assert {f.what: f.why for f in findings.values() if f.verdict == "failed"} == {}
    sure = {"partition", "GPUs a node", "cores a node", "memory a node", "time limit", "reservation", "constraint"}
    sure |= {"account", "QoS"} if rich.accounting else set()
    assert {what for what in sure if findings[what].verdict != "ok"} == set()


WRONG = [
    ("partition=gpus", "partition", "there is no 'gpus'; did you mean 'gpu'? There are: cpu, gpu"),
    ("account=nlq", "account", "no association with 'nlq'; did you mean 'nlp'?"),
    ("account=vision", "account", "vision may not use gpu"),
    ("qos=hihg", "QoS", "nlp may not use 'hihg'; did you mean 'high'?"),
    ("reservation=theirs", "reservation", "there is no 'theirs'; there are: ours"),
    ("constraint=h100", "constraint", "no node of gpu has 'h100'; did you mean 'a100'?"),
    ("node.gpus=8", "GPUs a node", "nodes of gpu have 4 at most; node.gpus is 8"),
    ("node.gpu_type=h100", "GPU type", "gpu has no h100; did you mean 'a100'?"),
    ("node.cpus=64", "cores a node", "nodes of gpu have 32 at most; node.cpus is 64"),
    ("node.memory_gb=512", "memory a node", "nodes of gpu have 256 GB at most"),
    ("time=1-00:00:00", "time limit", "1-00:00:00 is more than gpu gives: 8:00:00"),
    ("slurm_version=25.05", "Slurm version", "slurm_version 25.05 is newer"),
    ("slurm_conf=/no/slurm.conf", "slurm_conf", "/no/slurm.conf isn't here"),
    ("container.image=/no/image.sif", "image", "/no/image.sif isn't here"),
    ("container.mounts=[/no/data]", "mount /no/data", "/no/data isn't here"),
    ("container.runtime=pyxis", "pyxis", "srun has no --container-image"),
    ("paths.models=/nowhere/models", "paths.models", "no folder of /nowhere/models exists"),
    ("paths.runs=/proc/runs", "paths.runs", "/proc isn't a folder that you can write in"),
    ("gpu_request=gpus-per-node", "sbatch --test-only", ""),
]


@pytest.mark.parametrize(("override", "what", "why"), WRONG, ids=[override for override, _, _ in WRONG])
def test_what_is_wrong_is_found(right, rich, override, what, why):
    if what in ("account", "QoS") and not rich.accounting:
        pytest.skip("no accounting")
    if what.startswith("paths.runs") and os.geteuid() == 0 and os.access("/proc", os.W_OK):
        override, why = "paths.runs=/proc/version/runs", "/proc/version isn't a folder"
    finding = found(right, override)[what]
    assert (finding.verdict == "failed") == bool(why), finding
    assert why in finding.why


def test_exit_codes_and_json(right, tmp_path):
    told = mixlaunch("clusters", "check", right, "--json", "-o", "node.gpus=8")
    assert told.exit_code == 2
    answer = json.loads(told.output)
    assert answer["ok"] is False
    assert {f["what"] for f in answer["findings"] if f["verdict"] == "failed"} >= {
        "GPUs a node",
        "sbatch --test-only",
    }
    assert mixlaunch("clusters", "check", right).exit_code == 0
    nobody = tmp_path / "slurm.conf"
    nobody.write_text("ClusterName=x\nSlurmctldHost=localhost\nSlurmctldPort=1\nMessageTimeout=1\n")
    silent = mixlaunch("clusters", "check", right, "-o", f"slurm_conf={nobody}")
    assert silent.exit_code == 1
    assert "scontrol" in silent.output


def test_a_cluster_behind_a_login_node_is_checked_there(right, rich, tmp_path, monkeypatch):
    """Slurm, paths and image are looked at over there: here is neither a Slurm nor sbatch."""
    if not shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin"):
        pytest.skip("no sshd")
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    (tmp_path / "far").mkdir()
    values = yaml.safe_load(right.read_text())
    with sshd.running(tmp_path / "sshd", {"HOME": str(tmp_path / "far"), "PATH": os.environ["PATH"]}) as server:
        values["login"] = {"host": "127.0.0.1", "options": server.options}
        right.write_text(yaml.safe_dump(values))
        ssh_alone = tmp_path / "bin"
        ssh_alone.mkdir()
        (ssh_alone / "ssh").symlink_to(shutil.which("ssh"))
        with monkeypatch.context() as laptop:
            laptop.setenv("PATH", str(ssh_alone))
            findings = found(right)
            wrong = found(right, "partition=gpus")
        assert {f.what: f.why for f in findings.values() if f.verdict == "failed"} == {}
        assert findings["sbatch --test-only"].verdict == findings["image"].verdict == "ok"
        assert wrong["partition"].verdict == "failed"


def test_the_style_that_the_cluster_takes_is_found(rich, monkeypatch, tmp_path):
    """A site may want GPUs asked for in one way only; here an sbatch of our own does, and passes on the rest."""
    real = processes.which("sbatch")
    picky = tmp_path / "bin" / "sbatch"
    picky.parent.mkdir()
    refusal = 'case "$*" in *--gpus-per-* | *gpu:1*) echo "use --gres=gpu:a100:N" >&2; exit 1;; esac'
    picky.write_text(f'#!/bin/bash\n{refusal}\nexec {real} "$@"\n')
    picky.chmod(0o755)
    environment = {**os.environ, **rich.host.environment, "PATH": f"{picky.parent}:{os.environ['PATH']}"}
    asked = [sys.executable, "-m", "launcher", "clusters", "new", "--output", str(tmp_path / "picky.yaml")]
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = profile.read(tmp_path / "picky.yaml")
    assert (made.gpu_request, made.node.gpu_type) == ("gres", "a100")
    assert (
        "sbatch refused --gpus-per-node=1: sbatch: use --gres=gpu:a100:N" in (tmp_path / "picky.yaml").read_text()
    )
    assert "# constraint: a100  # features of these nodes: a100, ib" in (tmp_path / "picky.yaml").read_text()
