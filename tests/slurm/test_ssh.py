"""Submission from a laptop: the commands that a user types there, a real sshd, and the real Slurm behind it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sshd
from laptop import REASON, configure, replace

from launcher.runs import find

pytestmark = pytest.mark.skipif(not sshd.find() or not shutil.which("rsync"), reason=REASON)


HOSTILE = "a b'c\"d;$(touch {canary})`touch {canary}`|&<>*?[x]{{y}}~#!\\\\é%j"


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
    (run.path / "came_back").write_text("sandbox3\n" * 3)
    assert "as job" in laptop.types("retry", "finetune")
    [run] = laptop.there()
    assert not (run.path / "came_back").exists()  # it may come back three times again
    assert len(run.job_ids) == 2
    assert finish(run).state == "COMPLETED"
    assert laptop.types("logs") == "no space left\n"
    assert re.search(rf"{run.job_id} .*COMPLETED", laptop.types("status"))


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
    [run] = find.every([folder])
    assert finish(run).state == "COMPLETED"
    assert laptop.types("logs") == f"{hostile}\n"
    kept = site.host.call("scontrol", "show", "job", run.job_id)
    assert hostile.replace("\\", "") in kept
    assert run.job_id in laptop.types("status")
    assert not list(tmp_path.rglob("canary"))
    assert not (laptop.home / "canary").exists()


def test_a_mistake_is_known_before_anything_is_written(laptop):
    config = {"num_hidden_layers": 4, "num_local_experts": 6, "num_attention_heads": 4, "intermediate_size": 64}
    more = {
        "model_type": "mixtral",
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "vocab_size": 32000,
        "num_experts_per_tok": 2,
    }
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
        assert f"{option}: './out' is relative to this machine" in said


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


def test_plans_need_no_network(laptop):
    laptop.change(login={"host": "nowhere.invalid"})
    (laptop.bin / "ssh").unlink()
    small = ("--nodes", "16")
    assert re.search(r"through +nowhere.invalid", laptop.types("finetune", "--dry-run", *small))
    assert laptop.types("export", "finetune", *small).startswith("#!/bin/bash")


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
    seconds = []
    while len(seconds) < 3 and not any(took < 5 for took in seconds):  # once in three, where others are busy
        before, began = laptop.server.sessions, time.monotonic()
        table = laptop.types("status")
        seconds.append(time.monotonic() - began)
        assert len(re.findall(r"^finetune-.* COMPLETED", table, re.M)) == 20
        assert laptop.server.sessions - before <= 3  # the copies, squeue, sacct
        assert laptop.server.connections == 1
    assert min(seconds) < 5
    shutil.rmtree(run.path)
    assert run.name not in laptop.types("status")
