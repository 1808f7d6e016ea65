"""What is handed on holds everything: a source distribution the repository, a wheel what runs without one."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta as b; b.build_sdist('out'); b.build_wheel('out')"


@pytest.fixture(scope="module")
def files():
    """The repository's files, by git."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout of git, so nobody knows what belongs to the repository")
    told = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in told.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(files, tmp_path_factory):
    """The folder with both, built from a copy, since setuptools writes beside the sources."""
    copy = tmp_path_factory.mktemp("copy")
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return copy / "out"


def test_a_source_distribution_holds_the_whole_repository(files, built):
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        held = {name.partition("/")[2] for name in opened.getnames()}
    assert not files - held


def test_a_wheel_holds_both_packages_and_their_data(files, built):
    (archive,) = built.glob("*.whl")
    held = set(zipfile.ZipFile(archive).namelist())
    moved = {name: f"launcher/{name}" if name.startswith(("templates/", "clusters/")) else name for name in files}
    wanted = {to for name, to in moved.items() if to.startswith(("launcher/", "megatron_mixtral/"))}
    assert not wanted - held
    assert any(name.endswith("licenses/LICENSE") for name in held)
    assert not any(name.startswith("tests") for name in held)
