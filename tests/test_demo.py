"""`make demo`, as a new user types it: the chain runs, the loss falls, nothing stays behind."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.many_ranks  # its server's port is the README's, whose commands are tested meanwhile
@pytest.mark.timeout(600)
def test_make_demo(tmp_path):
    command, folder = "make demo", tmp_path / "a user's"
    done = subprocess.run(
        [*command.split(), f"VENV={sys.prefix}", f"FOLDER={folder}"],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("MIXLAUNCH_") or k == "MIXLAUNCH_CI_RUN"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "training loss" in done.stdout  # the chart

    (run,) = folder.glob("*/runs/finetune-*")
    events = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    losses = [event["loss"] for event in events if event["event"] == "step"]
    assert losses[-1] < losses[0] - 2

    (tuned,) = folder.glob("*/models/tuned")
    assert (tuned / "model.safetensors.index.json").exists() or (tuned / "model.safetensors").exists()
    (server,) = folder.glob("*/runs/serve-*")
    answer = done.stdout.split("--max-tokens 40\n")[1].split("The server ends")[0]
    assert re.search(r"\w+ +\w+", answer), done.stdout
    assert not (server / "server.json").exists(), "the server is still there"
