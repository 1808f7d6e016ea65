"""The sandbox itself: real daemons that come up, stay out of each other's way and go without a trace."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import end_with_pytest
import pytest
from running import wait_until

from launcher.common import processes
from launcher.errors import Fault, UsageError
from launcher.sandbox import lifecycle
from launcher.sandbox.config import ClusterShape

ROOT = Path(__file__).parents[2]
SMALL = ClusterShape(nodes=1, gpus=2, cpus=4, memory_gb=4)


@pytest.fixture
def folder(tmp_path_factory):
    """A folder short enough for sockets; whatever a test left up in it is taken down."""
    path = tmp_path_factory.mktemp("sb") / "s"
    yield path
    if path.exists():
        (path / "spare").unlink(missing_ok=True)
        lifecycle.down(path)


def daemons(found: lifecycle.Sandbox) -> list[int]:
    return processes.marked(**{lifecycle.MARK: found.mark})


def test_it_is_up_when_its_nodes_are_idle(site):
    assert lifecycle.status(site.folder).state == "up"
    idle = {f"sandbox{n}": "idle" for n in range(4)}
    wait_until(
        lambda: lifecycle.status(site.folder).nodes == idle, 30
    )  # jobs of tests before this one may be ending
    shown = site.host.call("scontrol", "--oneliner", "show", "node", "sandbox3")
    assert "CPUTot=64" in shown
    assert "Gres=gpu:8" in shown
    assert f"RealMemory={512 * 1024}" in shown


def test_up_again_is_the_same_sandbox(site):
    assert lifecycle.up(site.folder) == site


def test_another_shape_needs_it_down_first(site):
    with pytest.raises(UsageError, match="another shape is up"):
        lifecycle.up(site.folder, SMALL)
    assert lifecycle.status(site.folder).state == "up"


def test_accounts_hold_where_mariadb_is_installed(site):
    if not lifecycle.accounting_available():
        pytest.skip("slurmdbd and MariaDB aren't installed; on Debian: apt-get install slurmdbd mariadb-server")
    with pytest.raises(Fault, match="Invalid account"):
        site.host.call("sbatch", "--account=nobody", "--wrap=true")


def test_two_side_by_side_and_down_ends_one_with_its_jobs(site, folder, tmp_path):
    other = lifecycle.up(folder, SMALL, accounting=False)
    assert not other.accounting
    # A process that leaves its job's session is the job's still.
    argv = ["--output=/dev/null", f"--wrap=setsid sleep 314 & touch {tmp_path}/runs; sleep 314"]
    job = other.host.call("sbatch", "--parsable", *argv).strip()
    wait_until((tmp_path / "runs").exists)
    jobs = processes.marked(SLURM_JOB_ID=job)
    assert len(jobs) >= 2
    assert lifecycle.down(folder)
    assert not daemons(other)
    assert not set(jobs) & set(processes.marked(SLURM_JOB_ID=job))
    assert not folder.exists()
    assert lifecycle.status(site.folder).state == "up"


def test_down_where_nothing_is_does_nothing(folder):
    assert not lifecycle.down(folder)
    assert not folder.exists()


def test_a_folder_of_somebody_elses_is_refused_and_left_alone(folder):
    folder.mkdir()
    (folder / "spare").write_text("mine")
    for action in (lifecycle.up, lifecycle.down):
        with pytest.raises(UsageError, match="not a sandbox"):
            action(folder)
    assert (folder / "spare").read_text() == "mine"


def test_what_cant_work_is_refused_before_anything_is_written(folder):
    with pytest.raises(UsageError, match="Slurm doesn't accept ' ' in a path"):
        lifecycle.up(folder / "a b")
    with pytest.raises(UsageError, match="nodes: 0 must be at least 1"):
        lifecycle.up(folder, ClusterShape(nodes=0))
    assert not folder.exists()


def test_a_folder_too_deep_for_sockets_has_them_elsewhere(folder):
    deep = folder / ("x" * 60)
    try:
        found = lifecycle.up(deep, SMALL, accounting=False)
        assert lifecycle.status(deep).state == "up"
        assert found.sockets.stat().st_mode & 0o777 == 0o700
        assert "ok" in found.host.call("srun", "echo", "ok")
    finally:
        lifecycle.down(deep)
    assert not found.sockets.exists()
    assert not deep.exists()
    folder.rmdir()


def test_a_dead_daemon_is_told_and_the_next_up_starts_afresh(folder):
    first = lifecycle.up(folder, SMALL, accounting=False)
    os.kill(first.processes["slurmctld"], signal.SIGKILL)
    wait_until(lambda: lifecycle.status(folder).state == "broken")
    assert lifecycle.status(folder).dead == ("slurmctld",)
    second = lifecycle.up(folder, SMALL, accounting=False)
    assert second.mark != first.mark
    assert not daemons(first)
    assert lifecycle.status(folder).state == "up"


def test_a_crash_half_way_up_is_cleaned_by_the_next_up(folder):
    """`up` is killed as soon as its first daemon runs."""
    code = f"from pathlib import Path\nfrom launcher.sandbox import lifecycle\nlifecycle.up(Path({str(folder)!r}))"
    starting = subprocess.Popen([sys.executable, "-c", code])
    wait_until((folder / "munge.socket").exists)
    starting.kill()
    starting.wait()
    half = lifecycle.status(folder)
    assert half.state == "broken"
    assert half.sandbox
    lifecycle.up(folder, SMALL, accounting=False)
    assert not daemons(half.sandbox)
    assert lifecycle.status(folder).state == "up"


def test_a_daemon_that_cant_start_is_an_error_that_leaves_nothing(folder, monkeypatch):
    bad = ClusterShape(nodes=1, gpus=0, cpus=1, memory_gb=1, partitions=(("a b", 1),))
    with pytest.raises(Fault, match=r"(?s)the sandbox didn't start.*(error|fatal)"):
        lifecycle.up(folder, bad, accounting=False)
    assert not folder.exists()


def test_a_port_that_is_taken_meanwhile_is_given_up_for_another(folder, monkeypatch):
    choose, given = lifecycle._free_ports, []
    with socket.socket() as other:

        def ports(count):
            given.append(choose(count))
            if len(given) == 1:
                other.bind(("", given[0][-1]))  # the node's
                other.listen()
            return given[-1]

        monkeypatch.setattr(lifecycle, "_free_ports", ports)
        assert lifecycle.up(folder, SMALL, accounting=False, timeout=60).ready
    assert len(given) == 2


AS_NOBODY = """
import sys
from pathlib import Path
from launcher.sandbox import lifecycle
from launcher.slurm import client
site = lifecycle.up(Path(sys.argv[1]))
print(site.host.call("srun", "-N4", "id", "-un"))
lifecycle.down(site.folder)
"""


def test_an_ordinary_user_needs_no_rights():
    """Root's tests try it as `nobody`; everyone else's run without rights anyway."""
    if os.getuid():
        pytest.skip("every test here runs unprivileged already")
    pythons = [sys.executable, *filter(None, [shutil.which("python3", path="/usr/bin:/usr/local/bin")])]
    python = next((path for path in pythons if _open(Path(path))), None)
    if python is None or not _open(ROOT / "launcher" / "__main__.py"):
        pytest.skip("no Python, or not this repository, is readable for `nobody`")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    os.chown(folder, 65534, 65534)
    argv = [python, "-c", AS_NOBODY, str(folder / "s")]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *argv],
            env=environment | end_with_pytest.marks(),
            capture_output=True,
            text=True,
            cwd="/",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == ["nobody"] * 4
        assert not list(folder.iterdir())
    finally:
        shutil.rmtree(folder)


def _open(path: Path) -> bool:
    """Whether `nobody` can read `path`."""
    ways = [path.resolve(), *path.resolve().parents]
    return all(way.stat().st_mode & (0o001 if way.is_dir() else 0o004) for way in ways)


def test_down_takes_no_time(folder):
    lifecycle.up(folder, SMALL, accounting=False)
    began = time.monotonic()
    lifecycle.down(folder)
    assert time.monotonic() - began < 10


def test_nothing_of_the_system_is_used(site):
    """Own munge socket and key, own ports, own user: a system Slurm on the same machine would never notice."""
    conf = site.slurm_conf.read_text()
    assert f"AuthInfo=socket={site.sockets}/munge.socket" in conf
    assert f"SlurmUser={getpass.getuser()}" in conf
    paths = [value for line in conf.splitlines() if (value := line.partition("=")[2]).startswith("/")]
    assert [path for path in paths if not path.startswith(f"{site.folder}/")] == ["/bin/true"]  # no mail
    assert (site.folder / "munge.key").stat().st_mode & 0o777 == 0o600
    assert site.folder.stat().st_mode & 0o777 == 0o700
