"""The dress rehearsal, whole: `mixlaunch rehearse finetune --cluster selene --nodes 4`, and one that must fail."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import wait_until

from launcher.common import processes

COMMAND = "mixlaunch rehearse finetune --cluster selene --nodes 4"


def rehearse(home: Path, temporary: Path, *words: str, seconds: float = 540) -> subprocess.CompletedProcess[str]:
    """The command, ended, in a home of its own."""
    process = start(home, temporary, *words)
    try:
        output, complaint = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # takes its Slurm down
        process.wait()
    return subprocess.CompletedProcess(words, process.returncode, output, complaint)


def start(home: Path, temporary: Path, *words: str) -> "subprocess.Popen[str]":
    """Whatever this starts carries MIXLAUNCH_TEST."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MIXLAUNCH_", "SLURM_", "XDG_"))}
    environment |= {"HOME": str(home), "TMPDIR": str(temporary), "MIXLAUNCH_TEST": str(home)}
    argv = [sys.executable, "-m", "launcher", *words]
    return subprocess.Popen(
        argv, cwd=home, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture
def temporary(tmp_path):
    """The rehearsal's place for temporary files."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    return folder


@pytest.mark.many_ranks
@pytest.mark.timeout(1200)
def test_selene_is_rehearsed_with_all_its_ranks(tmp_path, temporary):
    done = rehearse(tmp_path, temporary, *COMMAND.split()[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    told = done.stdout
    # The script's differences are shown, and so is what they mean.
    assert "--- selene" in told
    assert "-    --container-image=" in told
    assert "container: runtime pyxis -> none" in told
    for line in (
        "4 nodes x 8 GPUs, partition luna",
        "32 ranks met",
        "tensor 1, pipeline 4, expert 8, expert_tensor 1, context 1, data 8",
        "the job started again by itself",
        "is COMPLETED, exit 0",
        "The rehearsal went well.",
    ):
        assert line in told
    assert not list(temporary.iterdir())
    assert not processes.marked(MIXLAUNCH_TEST=str(tmp_path))


def test_what_would_fail_there_fails_here(tmp_path, temporary):
    """A variable of the profile that no Python survives: told at the first rank that dies, with its words."""
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "scheduler": "slurm",
                "partition": "batch",
                "account": "Team",
                "qos": "gold",
                "constraint": "a100&ib",
                "reservation": "tonight",
                "comment": "two words",
                "node": {"gpus": 2, "cpus": 16, "memory_gb": 64},
                "environment": {"PYTHONHOME": "/nowhere"},
                "paths": {"models": "/lustre/m", "data": "/lustre/d", "runs": "/lustre/r"},
            }
        )
    )
    done = rehearse(tmp_path, temporary, "rehearse", "finetune", "--cluster", "mine.yaml", "--pp", "1", "--ep", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"FAILED: rank \d on sandbox0 left with 1 while waiting for the ranks to meet", done.stdout)
    assert "PYTHONHOME = '/nowhere'" in done.stdout
    [kept] = temporary.iterdir()
    assert f"everything of this rehearsal is in {kept}" in done.stdout
    assert list(kept.glob("runs/*/job.sbatch"))
    assert not (kept / "slurm").exists()
    assert not processes.marked(MIXLAUNCH_TEST=str(tmp_path))


def test_ctrl_c_takes_the_private_slurm_down(tmp_path, temporary):
    process = start(tmp_path, temporary, *["rehearse", "finetune", "--cluster", "selene", "--nodes", "4"])
    wait_until(lambda: list(temporary.glob("*/slurm/run/munged.pid")))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert not processes.marked(MIXLAUNCH_TEST=str(tmp_path))
    assert not list(temporary.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("rehearse finetune", "local has no scheduler to rehearse for; give --cluster"),
        ("rehearse finetune --cluster selene --nodes 3", "24 ranks don't fit"),
        ("rehearse finetune --cluster selene --nodes 4000 --global-batch 8000", "ranks take about"),
    ],
)
def test_what_cant_be_rehearsed_is_refused_at_once(tmp_path, temporary, words, said):
    done = rehearse(tmp_path, temporary, *words.split(), seconds=20)
    assert done.returncode == 2
    assert said in done.stderr
    assert not list(temporary.iterdir())
