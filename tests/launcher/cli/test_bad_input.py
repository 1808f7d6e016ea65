"""What people and broken files throw at the commands: exit 2, or 1 where the machine is at fault; no traceback."""

import errno
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli

SELENE = ["--cluster", "selene"]
EXPORT = ["export", "finetune", *SELENE]
MANY = "9" * 400


def profile_with(text):
    return f"scheduler: slurm\npaths: {{models: /m, data: /d, runs: /r}}\n{text}\n"


@pytest.fixture(autouse=True)
def there(home, monkeypatch):
    monkeypatch.chdir(home)


def refused(*words, code=2):
    """What is said on stderr."""
    result = CliRunner().invoke(cli, list(words))
    assert result.exit_code == code, result.output + repr(result.exception)
    assert result.stdout == ""
    return result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*EXPORT, "-o", "node.gpus=!!int x"], "unable to parse string as an integer"),
        ([*EXPORT, "-o", f"node.gpus={MANY * 20}"], "digits"),
        ([*EXPORT, "-o", "environment={A: !!bool maybe}"], "'maybe' isn't bool"),
        ([*EXPORT, "-o", f"environment={{A: !!float '{'1:' * 200}1'}}"], "isn't float"),
        ([*EXPORT, "-o", "environment={A: 1, A: 2}"], "A is there twice"),
        ([*EXPORT, "-o", "node={a: &a [*a]}"], "contains itself"),
        ([*EXPORT, "-o", "container.mounts=" + "[" * 30_000], "bytes long; at most"),
        ([*EXPORT, "-o", "container.mounts=[\udcff]"], "surrogates not allowed"),
        ([*EXPORT, "-o", "container.mounts=" + "[" * 5_000], "nested more than 100 deep"),
        ([*EXPORT, "-o", "node[0]=4"], "unknown key 'node[0]'"),
        ([*EXPORT, "-o", "binding.numa=[true, false]"], "binding.numa: true isn't a number"),
        ([*EXPORT, "-o", "node.gpus=true"], "node.gpus: true isn't a number"),
        ([*EXPORT, "-o", "node.gpu=8"], "did you mean 'gpus'?"),
        ([*EXPORT, "-o", "node.gpu_memory_gb=inf"], "less than or equal to 1000000"),
        ([*EXPORT, "-o", "extra.exclude=true"], "'exclude' needs nodes"),
        ([*EXPORT, "-o", "extra.exclude=a[0-99999],b[0-99999]"], "more than 100000 nodes"),
        ([*EXPORT, "-o", "extra.exclude=n[1-999999]"], "extra: 'n[1-999999]': '1-999999' isn't a range of at most"),
        ([*EXPORT, "-o", "extra.exclude=n[9-1]"], "extra: 'n[9-1]': '9-1' isn't a range"),
        ([*EXPORT, "-o", "extra={mail-type: [END]}"], "extra.mail-type: input should be a valid string"),
        ([*EXPORT, "-o", "environment.UID=5"], "UID is set by bash"),
        ([*EXPORT, "-o", "templates.job=/dev/null"], "begins with `#!`"),
        ([*EXPORT, "--time", "٣٠"], "--time: '٣٠' isn't a time limit"),
        ([*EXPORT, "--time", MANY], "--time: "),
        ([*EXPORT, "--time", ""], "--time: '' isn't a time limit"),
        ([*EXPORT, "--name", ""], "--name: '' isn't a name"),
        ([*EXPORT, "--sequence-length", MANY], "--sequence-length: "),
        ([*EXPORT, "--micro-batch", str(2**63)], "--micro-batch: "),
        ([*EXPORT, "--bundle", "/tmp/x\udcff"], "--bundle: "),
        (["export", "finetune", "--cluster", ""], "unknown cluster ''"),
        (["status", "--cluster", ""], "unknown cluster ''"),
        (["pipeline", "x.jsonl", *SELENE, "--name", "", "--dry-run"], "isn't a name"),
        (["finetune", "--cluster", "~nobody-here/x.yaml"], "~nobody-here/x.yaml: no such file"),
        (["finetune", "--cluster", "x" * 5000 + ".yaml"], "File name too long"),
        (["finetune", *SELENE, "--exclude", f"n[1-{MANY}]", "--dry-run"], "--exclude: "),
        (["plan", "finetune", *SELENE, "--nodes", "400000000"], "3200000000 ranks; at most"),
        (["plan", "finetune", *SELENE, "--cp", "10000000"], "at most 100000"),
        (["plan", "serve", *SELENE, "--tp", "2", "--nodes", "4000000"], "32000000 ranks; at most"),
        (["plan", "finetune", *SELENE, "--model", "/nope", "--pp", "999999937"], "at most 100000"),
        (["nodes", "add", "x", "--reason", "y", *SELENE], "isn't on this machine"),
        (["chat", "http://[::1"], "isn't a server's address"),
        (["chat", "https://h:abc"], "isn't a server's address"),
        (["chat", "http://h/\x01"], "isn't a server's address"),
        (["chat", "..:1"], "isn't a server's address"),
        (["chat", "10.0.0.256:5000"], "isn't a server's address"),
        (["chat", "localhost:99999"], "isn't a server's address"),
        (["chat", "localhost:5000", "-p", "x", "--temperature", "nan"], "--temperature: nan"),
        (["logs", "~nobody-here/x"], "not a run directory"),
    ],
)
def test_a_value_that_cant_be(words, said, home):
    assert said in refused(*words)
    assert not list(home.iterdir()), "something was written"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (profile_with("node: {gpus: !!int x}"), "x.yaml:3: 'x' isn't int"),
        (profile_with("node: {gpus: !!int ''}"), "x.yaml:3: '' isn't int"),
        (profile_with("exclusive: !!bool maybe"), "x.yaml:3: 'maybe' isn't bool"),
        (profile_with("time: !!timestamp soon"), "x.yaml:3: 'soon' isn't timestamp"),
        (profile_with("node[0]: 1"), "x.yaml:3: unknown key 'node[0]'"),
        (profile_with("environment: " + "[" * 60_000), "nested more than 100 deep"),
        (profile_with("node: {gpus: true}"), "x.yaml:3: node.gpus: true isn't a number"),
        (profile_with("serve: {port: true}"), "serve.port: true isn't a number"),
        ("extends: ~nobody-here/a.yaml", "extends: "),
        (f"extends: {'a' * 300}.yaml", "extends: "),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
            f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
        ), "more than 10000 keys and values"),
    ],
)  # fmt: skip
def test_a_profile_that_cant_be_hides_nothing_else(home, monkeypatch, text, said):
    (home / "x.yaml").write_text(text)
    assert said in refused("export", "finetune", "--cluster", "x.yaml")
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(home))
    for command in ("clusters", "status"):
        result = CliRunner().invoke(cli, [command])
        assert result.exit_code == 0, result.output + repr(result.exception)


CONFIG = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 96,
    "hidden_size": 64,
    "vocab_size": 320,
    "num_experts_per_tok": 2,
}


@pytest.mark.parametrize(
    "text",
    [
        *(json.dumps(CONFIG | {name: value}) for name in CONFIG for value in (0, -8, 1e400, None, "x", [])),
        "[" * 100_000,
        "[1]",
        "null",
    ],
)
def test_a_model_whose_sizes_cant_be_is_one_of_unknown_sizes(home, text):
    (home / "m").mkdir()
    (home / "m" / "config.json").write_text(text)
    for words in (["plan", "finetune", *SELENE], ["plan", "serve", *SELENE], ["export", "convert", *SELENE]):
        result = CliRunner().invoke(cli, [*words, "--model", f"{home}/m"])
        assert result.exit_code in (0, 2), result.output + repr(result.exception)


@pytest.mark.parametrize("text", ["[1]", "null", '{"schema": 1}', '{"schema": 1, "job": "x", "profile": {}}', "{"])
def test_a_folder_that_only_looks_like_a_run_is_passed_over(home, text):
    folder = home / "state" / "mixlaunch" / "runs" / "odd"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(text)
    assert CliRunner().invoke(cli, ["status"]).exit_code == 0
    assert "there are no runs" in refused("logs", "odd")
    assert "run.json" in refused("explain", f"{folder}")


def process(*words, folder, before=(), **more):
    argv = [*before, sys.executable, "-m", "launcher", *words]
    found = subprocess.run(argv, cwd=folder, env=os.environ | more, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in found.stderr
    return found.returncode, found.stderr


def test_a_working_directory_that_is_gone(home):
    (home / "gone").mkdir()
    leave = ["bash", "-c", 'rmdir "$PWD"; exec "$@"', "bash"]
    code, said = process("export", "prepare", "x", *SELENE, folder=home / "gone", before=leave)
    assert (code, said) == (2, "error: the working directory is gone; change to another\n")


@pytest.mark.parametrize("words", [["--help"], ["clusters"], EXPORT])
def test_a_full_disk(home, words):
    code, said = process(*words, folder=home, before=["bash", "-c", 'exec "$@" >/dev/full', "bash"])
    assert (code, said) == (1, "error: No space left on device\n")


def test_a_terminal_that_cant_show_it(home):
    (home / "x.yaml").write_text(profile_with("description: Zürich"), encoding="utf-8")
    words = ["clusters", "show", "x.yaml"]
    code, said = process(
        *words, folder=home, before=["bash", "-c", 'exec "$@" >/dev/null', "bash"], PYTHONIOENCODING="ascii"
    )
    assert code == 2
    assert "can't be written in ascii" in said


def test_stdin_that_is_closed(home):
    code, said = process("chat", "localhost:5000", folder=home, before=["bash", "-c", 'exec "$@" <&-', "bash"])
    assert (code, said) == (2, "error: the prompt is empty\n")


def test_a_folder_one_may_not_enter(home):
    without_rights = []
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may read everything, and there is no setpriv to give that up")
        rights = "-dac_override,-dac_read_search"
        without_rights = ["setpriv", f"--inh-caps={rights}", f"--bounding-set={rights}"]
    (home / "private").mkdir(mode=0)
    for words in (
        ["plan", "finetune", *SELENE, "--model", f"{home}/private/w"],
        ["finetune", "--model", f"{home}/private/w"],
        ["export", "finetune", "--cluster", f"{home}/private/p.yaml"],
        ["demo", "--text", f"{home}/private/x"],
        ["status", "--cluster", f"{home}/private/p.yaml"],
    ):
        code, said = process(*words, folder=home, before=without_rights)
        assert code == 2, said
        assert "private" in said
        assert "Permission denied" in said


def test_a_configuration_of_slurm_that_isnt_here_is_told_at_once(home, monkeypatch):
    """Slurm's own commands would look for it for a minute."""
    programs = home / "bin"
    programs.mkdir()
    for name in ("sbatch", "sinfo"):
        (programs / name).write_text("#!/bin/sh\nsleep 60\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    (home / "x.yaml").write_text(
        f"scheduler: slurm\nslurm_conf: /nope\npaths: {{models: {home}, data: {home}, runs: {home}/runs}}\n"
    )
    begin = time.monotonic()
    said = refused("tiny", "--output", f"{home}/t", "--cluster", "x.yaml", code=1)
    assert "slurm_conf: /nope isn't on this machine" in said
    assert not list((home / "runs").iterdir())
    assert CliRunner().invoke(cli, ["nodes", "add", "x", "--reason", "y", "--cluster", "x.yaml"]).exit_code == 0
    assert time.monotonic() - begin < 20


def test_ctrl_c_is_130(monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("launcher.runs.find.run", interrupted)
    assert CliRunner().invoke(cli, ["logs", "x"]).exit_code == 130


def test_a_job_that_no_record_can_keep_is_told_all_the_same(home, monkeypatch):
    from launcher.errors import UncertainError
    from launcher.runs import record

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(record, "write", full)
    with pytest.raises(UncertainError, match=r"job 4242 is submitted, but .*No space left"):
        record.with_job(record.Run(path=home, record={"jobs": []}), "4242")
