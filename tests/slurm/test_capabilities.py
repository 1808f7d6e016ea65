"""The table of sbatch's options, held to the sbatch that is installed."""

import pytest

from launcher.errors import Fault
from launcher.slurm import sbatch_options


def test_the_table_is_what_sbatch_takes(site, tmp_path, monkeypatch):
    """A word that sbatch doesn't know is told before the controller is asked for anything."""
    monkeypatch.chdir(tmp_path)  # `--wrap --usage` is a job, and its output comes here
    said = site.host.call("sbatch", "--version")
    version = ".".join(said.split()[1].split(".")[:2])
    if sbatch_options.number(version) > sbatch_options.number(sbatch_options.NEWEST):
        pytest.skip(f"Slurm {version} is newer than the table")
    known = sbatch_options.known_options(version)
    later = {option for options in sbatch_options.SINCE.values() for option in options} - known

    def taken(option: str) -> bool:
        try:
            site.host.call("sbatch", f"--{option}", "--usage")
        except Fault as fault:
            return "unrecognized option" not in str(fault) and "ambiguous" not in str(fault)
        return True

    assert len(known) >= 99
    assert [option for option in known if not taken(option)] == []
    # sbatch takes the beginning of a longer option's name for it.
    assert [o for o in later if taken(o) and not any(longer.startswith(o) for longer in known)] == []
