"""Quoting: whatever a value holds, the script gets exactly it, or the value is refused by name."""

import os
import shlex
import subprocess
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.common import quoting
from launcher.errors import UsageError
from launcher.script import lint
from launcher.submit import start

CARRIED = st.text(st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp")), max_size=40)


@settings(max_examples=30, deadline=None)
@given(st.lists(CARRIED, min_size=20, max_size=20))
def test_bash_reads_back_exactly_the_value(values):
    words = " ".join(quoting.sh(value) for value in values)
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {words}"],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.stdout.decode().split("\0")[:-1] == values


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("$a{}'\"\\`!_ "), max_size=20), min_size=20, max_size=20))
def test_what_looks_like_a_variable_is_carried_and_no_slip(values):
    words = " ".join(quoting.sh(value) for value in values)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == values
    assert not [found for found in lint.findings(f"#!/bin/bash\necho {words}\n") if "single quotes" in found]


def slurm_reads(text: str) -> str:
    """How sbatch reads a word of a directive; tests/slurm holds this to the real one."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, "#"
    return next(lexer)


@settings(max_examples=200)
@given(CARRIED.filter(lambda text: text.strip()))
def test_a_directive_is_one_word_that_means_the_value(value):
    assert slurm_reads(quoting.directive(value)) == value


@pytest.mark.parametrize("character", ["\n", "\r", "\0", "\t", "\x1b", "\x7f", "\u2028", "\ud800"])
def test_what_no_quoting_carries_is_refused_by_name(character):
    with pytest.raises(UsageError, match="--comment: the character"):
        quoting.checked(f"a{character}b", "--comment")


def test_excess_is_refused():
    with pytest.raises(UsageError, match="comment: 20000 bytes"):
        quoting.sh("x" * 20_000, "comment")
    with pytest.raises(UsageError, match="comment: 2000 bytes on an #SBATCH line"):
        quoting.directive("x" * 2_000, "comment")
    with pytest.raises(UsageError, match="comment: empty"):
        quoting.directive("", "comment")


@pytest.mark.parametrize("bad", ["", "-x", "a b", "a/b", "..", "a;b", "$(x)", "é", "x" * 65, "a\n"])
def test_names_are_plain(bad):
    with pytest.raises(UsageError, match="--name: "):
        quoting.name(bad, "--name")


def test_a_heredoc_cannot_be_ended_from_inside():
    with pytest.raises(UsageError, match="END"):
        quoting.heredoc("a: 1\nEND\nrm -rf", "END")


SECRET = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=60)


@settings(max_examples=20, deadline=None)
@given(values=st.lists(SECRET, min_size=1, max_size=20))
def test_bash_reads_back_every_secret(values, tmp_path_factory):
    """Secrets may hold what no script can: newlines and control characters, too."""
    run = tmp_path_factory.mktemp("run")
    names = [f"SECRET_{index}" for index in range(len(values))]
    plan = SimpleNamespace(job="prepare", secrets=tuple(names))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, values, strict=True):
            patch.setenv(name, value)
        start.write_secrets(plan, run)
    assert (run / "secrets.env").stat().st_mode & 0o777 == 0o600
    told = f'set -a; . "$1"; printf "%s\\0" {" ".join(f"${{{name}}}".join(chr(34) * 2) for name in names)}'
    done = subprocess.run(
        ["bash", "-c", told, "bash", str(run / "secrets.env")],
        capture_output=True,
        check=True,
        env={**os.environ, "LC_ALL": "C"},
    )
    assert done.stdout.decode().split("\0")[:-1] == values
