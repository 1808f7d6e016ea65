"""A shared runs folder in which another user writes: two real users, so only root can run this."""

import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.runs import find, record, servers, states

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can act as a second user")
EVE, MALLORY = 65534, 65533
GOOD = {
    "schema": 1,
    "job": "serve",
    "created": "2026-01-01T00:00:00+00:00",
    "jobs": ["1"],
    "host": "elsewhere",
    "resumable": True,
    "cancelled": False,
    "nodes": 1,
    "tasks_per_node": 1,
    "profile": {"name": "c", "scheduler": "slurm", "slurm_conf": "/tmp/evil.conf"},
}


@pytest.fixture
def runs(home):
    """The folder of the runs on this machine, open to everybody."""
    folder = home / "state" / "mixlaunch" / "runs"
    folder.mkdir(parents=True)
    folder.chmod(0o2777)
    return folder


def make(folder: Path, name: str, owner: int, text: str | None = None) -> Path:
    run = folder / name
    run.mkdir()
    if text is not None:
        (run / "run.json").write_text(text)
        (run / "run.json").chmod(0o644)
        os.chown(run / "run.json", owner, owner)
    run.chmod(0o755)
    os.chown(run, owner, owner)
    return run


def typed(*words):
    return CliRunner().invoke(cli, list(words))


def test_a_strangers_run_is_shown_and_decides_nothing(runs, monkeypatch):
    run = make(runs, "evil", EVE, json.dumps(GOOD))
    (run / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:9", "host": "127.0.0.1", "port": 9}))
    (run / "job.sbatch").write_text("#!/bin/bash\n")
    monkeypatch.setattr(states.client, "states", lambda *_: pytest.fail("no scheduler is asked"))
    monkeypatch.setattr(servers, "_get", lambda *_: pytest.fail("no server is asked"))
    (found,) = find.every([runs])
    assert found.stranger
    assert found.host.environment == {}
    assert "'s" in typed("status").output
    assert json.loads(typed("status", "--json").output)[0]["whose"] == found.stranger
    for words in (("cancel",), ("resume",), ("retry",), ("plot",), ("chat",), ("logs",), ("explain",), ("status",)):
        for reference in ("evil", str(run)):
            done = typed(*words, reference)
            assert (done.exit_code, "only its owner" in done.output) == (2, True), done.output
    assert "no server is running" in typed("chat", "-p", "x").output
    assert typed("explain", "evil", "--others").exit_code == 0
    assert typed("status", "evil", "--others").exit_code == 0
    assert typed("explain", "newest", "--others").exit_code == 2


HOSTILE = {
    "fifo": lambda path: os.mkfifo(path),
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "folder": lambda path: path.mkdir(),
    "huge": lambda path: os.truncate(_touched(path), 1 << 33),
    "deep": lambda path: path.write_text("[" * 100_000),
    "nested": lambda path: path.write_text('{"a":' * 400 + "1" + "}" * 400),
    "digits": lambda path: path.write_text("9" * 10_000),
    "bytes": lambda path: path.write_bytes(b"\xff\x00\x1b]0;x\x07"),
    "socket": lambda path: _bound(path),
    "number": lambda path: path.write_text("5"),
    "device": lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 3)),
}


def _touched(path):
    path.touch()
    return path


def _bound(path):
    with socket.socket(socket.AF_UNIX) as made:
        folder = os.open(path.parent, os.O_DIRECTORY)
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
        os.close(folder)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_hangs_or_breaks_a_command(runs, kind):
    make(runs, "mine", 0, json.dumps(GOOD | {"created": "2026-02-01T00:00:00+00:00"}))
    record_ = make(runs, "broken", EVE)
    HOSTILE[kind](record_ / "run.json")
    for name in ("events.jsonl", "logs/attempt_0/batch.log", "logs/attempt_0/first_exit", "server.json"):
        run = make(runs, f"with-{name.replace('/', '-')}", EVE, json.dumps(GOOD))
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        HOSTILE[kind](run / name)
    shown = typed("status")
    assert shown.exit_code == 0, shown.output + repr(shown.exception)
    assert "BROKEN" in shown.output
    assert "mine" in shown.output
    assert typed("status", "--json").exit_code == 0
    for name in [path.name for path in runs.iterdir() if path.name.startswith("with-")]:
        done = typed("explain", name, "--others")
        assert done.exit_code == 0, done.output + repr(done.exception)


@pytest.mark.parametrize(
    "wrong",
    [
        {"created": "yesterday"},
        {"created": 5},
        {"created": "9999-12-31T23:59:59-23:00"},
        {"jobs": [42]},
        {"jobs": ["4\0"]},
        {"jobs": "1"},
        {"pipeline": {}},
        {"pipeline": 5},
        {"nodes": "x"},
        {"tasks_per_node": 0},
        {"profile": {"name": 5, "scheduler": []}},
        {"schema": 2},
    ],
    ids=str,
)
def test_wrong_types_are_one_line(runs, wrong):
    make(runs, "odd", 0, json.dumps(GOOD | wrong))
    shown = typed("status")
    assert (shown.exit_code, "BROKEN" in shown.output) == (0, True), shown.output + repr(shown.exception)


def test_a_group_that_may_write_makes_it_a_strangers(runs):
    run = make(runs, "shared", 0, json.dumps(GOOD))
    os.chown(run, 0, MALLORY)
    run.chmod(0o2775)
    assert record.read(run).stranger == f"writable by the group {MALLORY}"
    assert "chmod -R go-w" in typed("cancel", "shared").output


AS_USER = """
import os, sys
sys.path.insert(0, {root!r})
from launcher.common import files  # before: the others may not read this Python's folder
from pathlib import Path
os.setgroups([]); os.setgid({gid}); os.setuid({uid}); os.umask(0o022)
folder = Path({folder!r})
with files.locked_shared(folder / ".bad_nodes.json.lock"):
    files.write_shared(folder / "bad_nodes.json", [{uid}])
"""


@pytest.mark.parametrize("mode", [0o2775, 0o3775, 0o3777], ids=oct)
def test_a_second_member_writes_the_list(mode):
    with tempfile.TemporaryDirectory(dir="/tmp") as above:
        Path(above).chmod(0o755)
        folder = Path(above) / "runs"
        folder.mkdir()
        os.chown(folder, 0, MALLORY)
        folder.chmod(mode)
        root = str(Path(record.__file__).parents[2])
        for uid in (EVE, MALLORY, EVE):
            code = AS_USER.format(uid=uid, gid=MALLORY, folder=str(folder), root=root)
            done = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd="/"
            )
            assert done.returncode == 0, done.stderr
            assert json.loads((folder / "bad_nodes.json").read_text()) == [uid]
        assert sorted(path.name for path in folder.iterdir()) == [".bad_nodes.json.lock", "bad_nodes.json"]
