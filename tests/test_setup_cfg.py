"""What setup.cfg lists by name is what is there.

A folder in no list would be missing in a wheel, or free to import what it likes.
"""

import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WALL = "importlinter:contract:wall"


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folders(package: str) -> set[str]:
    """`package` and all folders below that hold Python, by their dotted names."""
    return {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / package).rglob("*.py")}


def listed(setup_cfg, section: str, key: str) -> list[str]:
    return setup_cfg[section][key].split()


def test_each_folder_of_both_packages_is_in_the_wheel(setup_cfg):
    data = {"launcher.templates", "launcher.clusters"}
    packages = listed(setup_cfg, "options", "packages")
    assert packages == sorted(folders("launcher") | folders("megatron_mixtral") | data)


def test_the_wall_keeps_the_launcher_from_all_of_the_core_but_its_spec(setup_cfg):
    names = {path.stem for path in (ROOT / "megatron_mixtral").iterdir() if not path.name.startswith("_")}
    core = {f"megatron_mixtral.{name}" for name in names}
    forbidden = set(listed(setup_cfg, WALL, "forbidden_modules"))
    assert forbidden - {"megatron", "torch", "transformers"} == core - {"megatron_mixtral.spec"}
