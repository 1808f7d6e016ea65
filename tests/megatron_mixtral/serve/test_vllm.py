"""The job around `vllm serve`, with a stand-in for vLLM: what it is told, what it serves, how it ends.

The stand-in answers `/health` and writes down its arguments; that vLLM takes these is not tested here.
"""

import json
import os
import signal
import sys
import time

import httpx
import psutil
import pytest
from run_job import Job

STAND_IN = """\
#!{python}
import http.server, json, os, signal, sys, time, subprocess
from pathlib import Path
options = dict(zip(sys.argv[3::2], sys.argv[4::2]))
key = os.environ.get("VLLM_API_KEY")
helper = subprocess.Popen(["sleep", "600"])
told = {{"argv": sys.argv[1:], "key": key, "files": sorted(os.listdir(sys.argv[2])), "helper": helper.pid}}
Path(os.environ["TOLD"]).write_text(json.dumps(told))
{does}
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_): pass
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.ThreadingHTTPServer((options["--host"], int(options["--port"])), Health).serve_forever()
"""
KEY = "key-for-vllm"


@pytest.fixture
def start(served_model, tmp_path):
    """Start the job on a form of the model, with a stand-in that `does` something first."""
    started = []

    def make(form, does="", **config):
        program = tmp_path / "bin" / "vllm"
        program.parent.mkdir()
        program.write_text(STAND_IN.format(python=sys.executable, does=does))
        program.chmod(0o755)
        path = f"{program.parent}:{os.environ['PATH']}"
        env = {"PATH": path, "TOLD": str(tmp_path / "told"), "MIXLAUNCH_API_KEY": KEY}
        settings = {
            "model": str(served_model[form]),
            "engine": "vllm",
            "exports": str(tmp_path / "models"),
            "port": 0,
        }
        (tmp_path / "models").mkdir()
        started.append(Job("serve", settings | config, tmp_path / "run", env=env))
        return started[-1]

    yield make
    for job in started:
        job.close()


def told(tmp_path):
    return json.loads((tmp_path / "told").read_text())


def test_a_hub_folder_is_served_as_it_is_and_found_until_it_ends(start, served_model, tmp_path):
    job = start(0, name="it", layout={"tensor": 2, "expert": 2}, max_batch=7)
    job.wait_for("ready", timeout=60)
    state = json.loads((tmp_path / "run" / "server.json").read_text())
    assert httpx.get(f"{state['url']}/health").status_code == 200
    known = told(tmp_path)
    assert known["argv"][:2] == ["serve", str(served_model[0])]
    options = dict(zip(known["argv"][2:-1:2], known["argv"][3:-1:2], strict=True))
    assert options == {
        "--host": "127.0.0.1",
        "--port": str(state["port"]),
        "--served-model-name": "it",
        "--dtype": "bfloat16",
        "--max-model-len": "512",  # the model's context, shorter than the default
        "--max-num-seqs": "7",
        "--tensor-parallel-size": "2",
        "--pipeline-parallel-size": "1",
    }
    assert known["argv"][-1] == "--enable-expert-parallel"
    assert known["key"] == KEY
    assert KEY not in json.dumps(known["argv"]) + job.output()
    job.signal(0, signal.SIGUSR2)
    assert job.wait(20) == [0]
    assert not (tmp_path / "run" / "server.json").exists()
    end = time.monotonic() + 5
    while is_running(known["helper"]):
        assert time.monotonic() < end, "what vLLM started is left behind"
        time.sleep(0.05)


def is_running(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_converted_weights_are_exported_once(start, tmp_path):
    job = start(1)
    job.wait_for("ready", timeout=90)
    folder = tmp_path / "models" / "megatron-hf"
    assert told(tmp_path)["argv"][1] == str(folder)
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= set(told(tmp_path)["files"])
    job.signal(0, signal.SIGTERM)
    assert job.wait(20) == [0]


@pytest.mark.parametrize(("does", "code"), [("sys.exit(3)", 1), ("os.kill(os.getpid(), 9)", 1)])
def test_its_death_is_the_jobs(start, tmp_path, does, code):
    job = start(0, does=does)
    assert job.wait(30) == [code]
    assert "vllm ended by itself" in job.output()
    assert job.events("exit")[-1]["code"] == 1
    assert not (tmp_path / "run" / "server.json").exists()


def test_without_vllm_the_mistake_is_named(served_model, tmp_path):
    settings = {"model": str(served_model[0]), "engine": "vllm", "port": 0, "max_tokens": 256}
    with Job("serve", settings, tmp_path, env={"PATH": "/nowhere"}) as job:
        assert job.wait(30) == [2]
        assert "vllm isn't installed where this job runs" in job.output()
