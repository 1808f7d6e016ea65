"""The list of bad nodes: shared with the runs folder, with reasons and an end, left out of every script."""

import datetime
import json
import threading

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.cluster import bad_nodes, profile
from launcher.errors import Fault, UsageError
from launcher.planning import jobs
from launcher.script import render
from launcher.submit import start

DAY = datetime.timedelta(days=1)


@pytest.fixture
def mine(write_profile, tmp_path):
    paths = ", ".join(f"{name}: {tmp_path / name}" for name in ("models", "data", "runs"))
    return write_profile(f"paths: {{{paths}}}")


@pytest.fixture
def cluster(mine):
    return profile.read(mine)


def run(*argv):
    return CliRunner().invoke(cli, list(argv))


def test_an_entry_holds_until_it_expires(cluster):
    bad_nodes.add(cluster, {"gpu07": "fell off the bus"}, DAY)
    bad_nodes.add(cluster, {"gpu08": "slow"}, datetime.timedelta(seconds=-1))
    assert [entry.node for entry in bad_nodes.read(cluster)] == ["gpu07"]
    bad_nodes.add(cluster, {"gpu09": "for good"}, None)
    assert [(e.node, e.reason, e.until is None) for e in bad_nodes.read(cluster)] == [
        ("gpu07", "fell off the bus", False),
        ("gpu09", "for good", True),
    ]
    kept = json.loads(bad_nodes.path(cluster).read_text())["nodes"]
    assert "gpu08" not in [entry["node"] for entry in kept]


def test_scripts_leave_them_out_with_the_profiles_own(cluster):
    bad_nodes.add(cluster, {"gpu07": "x", "gpu08": "x"}, DAY)
    own = cluster.model_copy(update={"extra": {"exclude": "gpu[01-02]", "nice": "5"}})
    script = render.render(start.leave_out(jobs.plan_download(own), bad_nodes.read(own)))
    assert [line for line in script.splitlines() if "exclude" in line] == ['#SBATCH --exclude="gpu[01-02,07-08]"']
    assert "--exclude" not in render.render(jobs.plan_download(cluster))


def test_a_dry_run_shows_it(cluster, mine):
    bad_nodes.add(cluster, {"gpu07": "x"}, DAY)
    argv = ("prepare", "/a.txt", "--cluster", str(mine), "--dry-run", "--exclude", "gpu[01-02]")
    assert '#SBATCH --exclude="gpu[01-02,07]"\n' in run(*argv).output


def test_a_list_that_cant_be_read_is_no_empty_list(cluster):
    bad_nodes.path(cluster).parent.mkdir()
    for text in ("{", "[]", '{"nodes": [{"node": 1}]}'):
        bad_nodes.path(cluster).write_text(text)
        with pytest.raises(Fault, match=r"bad_nodes.json: not a list of nodes .*; correct or remove it"):
            bad_nodes.read(cluster)


def test_two_who_write_at_once_both_stay(cluster):
    def add(number):
        bad_nodes.add(cluster, {f"gpu{number}": "x"}, DAY)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(bad_nodes.read(cluster)) == 20


def test_the_commands(cluster, mine):
    where = ("--cluster", str(mine))
    assert "no bad nodes of cluster" in run("nodes", *where).output
    added = run("nodes", "add", *where, "gpu[07-08]", "--reason", "Xid 79", "--for", "12h")
    assert added.exit_code == 0, added.output
    shown = json.loads(run("nodes", "list", *where, "--json").output)
    assert [(e["node"], e["reason"]) for e in shown] == [("gpu07", "Xid 79"), ("gpu08", "Xid 79")]
    assert run("nodes", "remove", *where, "gpu08").exit_code == 0
    assert run("nodes", *where).output.split()[:8] == [
        "NODE",
        "UNTIL",
        "BY",
        "REASON",
        "gpu07",
        *run("nodes", *where).output.split()[5:8],
    ]
    refused = run("nodes", "remove", *where, "gpu08")
    assert (refused.exit_code, "gpu08: not on the list of cluster; there are: gpu07" in refused.output) == (2, True)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("add", "gpu[3-1]", "--reason", "x"), "isn't a range"),
        (("add", "a;b", "--reason", "x"), "isn't the name of a host"),
        (("add", "gpu1", "--reason", "a\nb"), "--reason"),
        (("add", "gpu1", "--reason", "x", "--for", "soon"), "such as 12h, 7d, 2w or forever"),
    ],
)
def test_mistakes_are_named(mine, argv, said):
    refused = run("nodes", *argv, "--cluster", str(mine))
    assert (refused.exit_code, said in refused.output) == (2, True), refused.output
    assert not (mine.parent / "runs").exists()


def test_this_machine_has_no_nodes():
    for argv in (("nodes", "add", "x", "--reason", "y"), ("tiny", "--output", "/x", "--exclude", "x")):
        refused = run(*argv, "--cluster", "local")
        assert (refused.exit_code, "no nodes to exclude" in refused.output) == (2, True)


def test_durations():
    assert bad_nodes.duration("2w") == 14 * DAY
    assert bad_nodes.duration("forever") is None
    for text in ("", "0d", "-1d", "5", "1y", "99999d"):
        with pytest.raises(UsageError, match="--for"):
            bad_nodes.duration(text)
