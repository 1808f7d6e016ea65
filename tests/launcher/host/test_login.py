"""Clusters behind a login node, as far as no network is needed: when ssh is used, and whose copy a path is."""

import socket
from pathlib import Path

import pytest
import yaml

from launcher.cluster import profile
from launcher.cluster.sections import Login
from launcher.errors import ProfileError
from launcher.host import copies, ssh
from launcher.host.local import Local
from launcher.host.login_node import LoginNode
from launcher.runs import record

PATHS = {"models": "/m", "data": "/d", "runs": "/shared/runs"}


def written(folder: Path, **more) -> Path:
    path = folder / "far.yaml"
    path.write_text(yaml.safe_dump({"scheduler": "slurm", "paths": PATHS, **more}))
    return path


@pytest.fixture(autouse=True)
def on_laptop(monkeypatch, tmp_path):
    monkeypatch.setattr(socket, "gethostname", lambda: "laptop.example.org")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.mark.parametrize(
    ("login", "through"),
    [
        ({}, None),
        ({"host": "login1"}, "login1"),
        ({"host": "me@login1.example.org"}, "me@login1.example.org"),
        ({"host": "localhost"}, "localhost"),  # a forwarded port
        ({"host": "127.0.0.1"}, "127.0.0.1"),
        ({"host": "laptop"}, None),
        ({"host": "me@laptop.example.org"}, None),
        ({"host": "laptop.elsewhere.org"}, "laptop.elsewhere.org"),
        ({"host": "login1", "inside": ("lap*",)}, None),
        ({"host": "login1", "inside": ("*.example.org",)}, None),
        ({"host": "login1", "inside": ("login*",)}, "login1"),
        ({"host": ""}, None),
    ],
)
def test_ssh_is_used_from_elsewhere_only(login, through):
    node = Login(**login).node
    assert (node.host if node else None) == through


def test_a_login_node_may_know_itself_by_its_short_name(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "login1")
    assert Login(host="login1.example.org").node is None
    assert Login(host="login2.example.org").node is not None
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    assert Login(host="localhost").node is not None


def test_an_override_leaves_ssh_out(tmp_path):
    path = written(tmp_path, login={"host": "login1"})
    assert profile.read(path).host == LoginNode(ssh.Login("login1"))
    assert profile.read(path, ["login.host="]).host == Local()


@pytest.mark.parametrize(
    ("login", "said"),
    [
        ({"host": "-oProxyCommand=touch x"}, "would be read as an option"),
        ({"host": "a b"}, "isn't a name for ssh"),
        ({"host": "login1;reboot"}, "isn't a name for ssh"),
        ({"host": "::1"}, "ports and addresses with colons go into options"),
        ({"host": "login1", "options": {"Port 22\n": "x"}}, "isn't an option of ssh_config"),
        ({"host": "login1", "options": {"Port": ""}}, "isn't an option of ssh_config"),
        ({"hosts": "login1"}, "did you mean 'host'"),
    ],
)
def test_a_login_that_cant_be_is_refused(tmp_path, login, said):
    with pytest.raises(ProfileError, match=said):
        profile.read(written(tmp_path, login=login))


def test_a_cluster_of_this_machine_has_no_login_node(tmp_path):
    with pytest.raises(ProfileError, match=r"login\.host: jobs of this cluster are processes of this machine"):
        profile.read(written(tmp_path, scheduler="local", login={"host": "login1"}))


def test_a_login_survives_being_written_down():
    login = ssh.Login("me@login1", ("IdentityFile=/a b/'c", "Port=22"))
    assert ssh.Login.decoded(login.encoded()) == login


def test_a_copy_knows_its_original(tmp_path):
    cluster = profile.read(written(tmp_path, login={"host": "login1"}))
    copy = cluster.runs_here / "finetune-1"
    assert copy.is_relative_to(tmp_path / "state")
    assert cluster.host.original(copy) == Path("/shared/runs/finetune-1")
    assert cluster.host.shown(copy) == "login1:/shared/runs/finetune-1"
    run = record.Run(path=copy, record={"profile": cluster.model_dump(mode="json"), "jobs": []})
    assert run.host == cluster.host == LoginNode(ssh.Login("login1"))
    there = record.Run(path=Path("/shared/runs/finetune-1"), record=run.record)
    assert there.host == Local()
    assert there.host.original(there.path) == there.path


def test_two_ports_of_one_host_are_two_clusters(tmp_path):
    one, other = (ssh.Login("localhost", (f"Port={port}",)) for port in (1, 2))
    path = Path("/shared/runs")
    assert copies.place(one, path) != copies.place(other, path)
    assert copies.login_of(copies.place(other, path)) == other
    assert Local().place(path) == path
