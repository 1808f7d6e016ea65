"""TAB: what a shell is offered, by a real bash where one is needed, and how soon."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.cli import completion
from launcher.cli.main import cli

PROGRAM = Path(sys.executable).parent / "mixlaunch"


def offered(*words: str) -> list[str]:
    """What bash would offer for the last of `words`."""
    environment = {**os.environ, "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    asked = subprocess.run(
        [sys.executable, "-c", "from launcher.cli.main import main; main()"],
        env={**environment, "_MIXLAUNCH_COMPLETE": "bash_complete"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stderr == ""
    return [line.partition(",")[2] for line in asked.stdout.splitlines() if line.startswith("plain,")]


@pytest.fixture
def run(tmp_path):
    """Make run directories where the local cluster has them."""

    def make(*names: str) -> None:
        for age, name in enumerate(reversed(names)):
            folder = tmp_path / "state" / "mixlaunch" / "runs" / name
            folder.mkdir(parents=True)
            (folder / "run.json").touch()
            os.utime(folder, (age, age))

    return make


def test_clusters_are_offered(tmp_path, monkeypatch):
    (tmp_path / "clusters").mkdir()
    (tmp_path / "clusters" / "selfmade.yaml").write_text("broken: [")
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(tmp_path / "clusters"))
    assert offered("mixlaunch", "finetune", "--cluster", "sel") == ["selene", "selfmade"]
    assert offered("mixlaunch", "export", "serve", "--cluster", "sel") == ["selene", "selfmade"]
    assert offered("mixlaunch", "status", "--cluster", "sel") == ["selene", "selfmade"]
    assert offered("mixlaunch", "clusters", "check", "sel") == ["selene", "selfmade"]


@pytest.mark.parametrize("command", ["status", "logs", "cancel", "explain", "resume"])
def test_runs_are_offered_the_newest_first(run, command):
    run("serve-2", "finetune-b", "finetune-a")
    assert offered("mixlaunch", command, "") == ["serve-2", "finetune-b", "finetune-a"]
    assert offered("mixlaunch", command, "fine") == ["finetune-b", "finetune-a"]
    assert offered("mixlaunch", command, "fine*") == []


def test_keys_variables_commands_and_choices_are_offered(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "x")
    assert "node.gpus=" in offered("mixlaunch", "finetune", "-o", "node.")
    assert offered("mixlaunch", "finetune", "--env", "MY_TO") == ["MY_TOKEN"]
    assert offered("mixlaunch", "fine") == ["finetune"]
    assert offered("mixlaunch", "convert", "v") == ["verify"]
    assert "tiny" not in offered("mixlaunch", "")
    assert offered("mixlaunch", "finetune", "--precision", "") == ["bf16", "fp32"]


def test_a_real_bash_completes():
    script = completion.script("bash", cli)
    asked = "COMP_WORDS=(mixlaunch finetune --cluster sele); COMP_CWORD=3; _mixlaunch_completion mixlaunch"
    asked += '; echo "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", f"{script}\n{asked}; complete -p mixlaunch"],
        env={**os.environ, "PATH": f"{PROGRAM.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["selene", "complete -o nosort -F _mixlaunch_completion mixlaunch"]


def test_every_shell_has_its_script():
    assert "#compdef mixlaunch" in completion.script("zsh", cli)
    assert "complete --no-files --command mixlaunch" in completion.script("fish", cli)


def test_it_answers_at_once(run):
    run(*(f"finetune-{n}" for n in range(200)))

    def once(*words: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        offered(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    for words in ([""], ["finetune", "--cluster", ""], ["logs", ""]):
        assert min(once("mixlaunch", *words) for _ in range(3)) < 0.3
