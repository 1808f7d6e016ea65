"""The command line as people meet it: what it prints, how fast, what each mistake is told, and what it leaves."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from launcher.cli import options
from launcher.cli.main import SHOWN, cli
from launcher.planning import jobs
from launcher.script import render
from megatron_mixtral.spec.jobs import JOBS
from megatron_mixtral.spec.options import own

HEAVY = ("torch", "megatron", "transformers", "submitit", "pydantic", "jinja2", "rich", "huggingface_hub", "httpx")


@pytest.fixture
def mixlaunch(tmp_path):
    """Run a command; its exit code, stdout and stderr."""

    def run(*words: str):
        result = CliRunner().invoke(cli, [str(w) for w in words], prog_name="mixlaunch")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


UNDER = {"verify": "convert"}  # jobs whose commands lie under another's


def typed(job: str) -> list[str]:
    return [UNDER[job], job] if job in UNDER else [job]


def command_of(job: str):
    return cli.commands[UNDER[job]].commands[job] if job in UNDER else cli.commands[job]


def launched(*words: str, code: str = "from launcher.cli.main import main; main()") -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, cwd="/", check=False, timeout=60
    )


def seconds(*words: str, **how: str) -> float:
    """What a command takes on an idle machine: its processor time, the best of a few; others run beside it."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        launched(*words, **how)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return min(once() for _ in range(5))


@pytest.fixture(scope="module")
def slowness():
    """How much slower this machine imports the libraries of every plan than the one the bars are meant for."""
    libraries = "import click, jinja2, pydantic, yaml; pydantic.BaseModel, jinja2.Environment"
    return max(1.0, seconds(code=libraries) / 0.12)


def test_help_is_quick(slowness):
    assert seconds("--help") < 0.2 * slowness


def test_help_says_of_each_command_what_its_own_help_begins_with():
    told = {name: cli.commands[name].get_short_help_str(70) for name in SHOWN}
    assert {name: line for name, (_, line) in SHOWN.items()} == told


def test_export_is_quick(slowness):
    assert seconds("export", "finetune", "--cluster", "selene") < 0.5 * slowness


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from launcher.cli.main import cli; cli(['--help'], standalone_mode=False);"
        f"print([m for m in {HEAVY!r} if m in sys.modules], file=sys.stderr)"
    )
    assert launched(code=code).stderr.strip() == "[]"


@pytest.mark.parametrize("job", ["finetune", "serve", "convert"])
def test_planning_imports_no_part_of_the_job(job):
    code = (
        "import sys; from launcher.cli.main import cli; cli(sys.argv[1:], standalone_mode=False);"
        "heavy = 'torch', 'numpy', 'megatron', 'transformers', 'submitit'; wall = 'megatron_mixtral.';"
        "known = tuple(f'{wall}{part}' for part in ('spec', 'errors'));"
        "own = [m for m in sys.modules if m.startswith(wall) and not m.startswith(known)];"
        "print(own + [m for m in heavy if m in sys.modules], file=sys.stderr)"
    )
    assert launched("export", job, "--cluster", "selene", code=code).stderr.strip() == "[]"


def test_mistakes_are_told_within_a_second():
    assert seconds("finetune", "--cluster", "selene", "--nodes", "3") < 1


MISTAKES = [
    (["finetune", "--nodes", "4", "--node", "3"], ["No such option", "--nodes"]),
    (["finetun"], ["No such command 'finetun'", "finetune"]),
    (["finetune", "--cluster", "selen"], ["unknown cluster 'selen'; did you mean 'selene'?", "local"]),
    (["finetune", "--cluster", "./none.yaml"], ["./none.yaml: no such file"]),
    (["serve", "--model", "no/such"], ["convert --model no/such` makes it", "a folder here is written ./no/such"]),
    (
        ["finetune", "--cluster", "selene", "--nodes", "3"],
        ["DP = 24 / (TP 1 x PP 4 x CP 1) = 6", "0.75", "nearest 4"],
    ),
    (["finetune", "--cluster", "selene", "--nodes", "0"], ["--nodes: 0 must be at least 1"]),
    (["finetune", "--steps", "ten"], ["--steps: 'ten' isn't a whole number"]),
    (["finetune", "--lr", "-1"], ["--lr: -1.0 must be at least 0"]),
    (["finetune", "--precision", "fp8"], ["'fp8' is not one of 'bf16', 'fp32'"]),
    (["finetune", "--name", "a/b"], ["--name: 'a/b' isn't a name"]),
    (["finetune", "--time", "soon"], ["--time: 'soon' isn't a time limit"]),
    (["finetune"], ["weights:", "Mixtral-8x7B-v0.1-megatron doesn't exist", "`mixlaunch convert"]),
    (
        ["finetune", "--model", "/none", "--data", "/gone"],
        ["weights: /none doesn't exist", "data: /gone.idx doesn't"],
    ),
    (["serve", "--port", "70000"], ["--port: 70000 must be between 1 and 65535"]),
    (["convert", "--model", "/no/such/model"], ["weights: /no/such/model doesn't exist"]),
    (["convert", "--preset", "fast"], ["'fast' is not one of 'train', 'inference'"]),
    (["prepare", "/no/such/text"], ["text: /no/such/text doesn't exist"]),
    (["prepare"], ["Missing argument 'FILES...'"]),
    (["download", "Mixtral"], ["'Mixtral' isn't a repository of the hub"]),
    (["download", "--cluster", "selene"], ["/lustre/fsw/mixlaunch/models isn't on this machine", "selene"]),
    (["export", "finetune", "--tp", "3"], ["query groups / TP = 8 / 3"]),
    (["logs", "none"], ["there are no runs in"]),
    (["cancel", "none"], ["there are no runs in"]),
    (["clusters", "show", "nowhere"], ["unknown cluster 'nowhere'"]),
    (["rehearse", "finetune", "--cluster", "local"], ["no scheduler to rehearse for"]),
    (["chat", "nowhere"], ["there are no runs in"]),
    (["demo", "--text", "/no/such/text"], ["/no/such/text: no such file"]),
    (["demo", "--text", "/etc/os-release"], ["/etc/os-release", "bytes of text are too few", "8000"]),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_exit_2_one_message_and_no_trace(mixlaunch, home, monkeypatch, words, said):
    monkeypatch.chdir(home)
    result = mixlaunch(*words)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    for words_said in said:
        assert words_said in result.stderr
    assert result.stdout == ""
    assert not list(home.iterdir()), "something was written"


def test_an_unknown_key_of_a_profile_is_exit_2(mixlaunch, write_profile, home):
    path = write_profile("partitoin: x")
    result = mixlaunch("finetune", "--cluster", path)
    assert result.exit_code == 2
    assert "unknown key 'partitoin'; did you mean 'partition'?" in result.stderr
    assert list(home.iterdir()) == [path]


@pytest.mark.parametrize("job", jobs.PLANS)
def test_export_prints_the_script_and_nothing_else(mixlaunch, job):
    more = {"tiny": ["--output", "/x"], "prepare": ["/x"], "verify": ["/x"]}.get(job, [])
    result = mixlaunch("export", job, "--cluster", "selene", *more)
    assert result.stderr == ""
    assert result.stdout.startswith("#!/bin/bash\n#SBATCH ")
    assert subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=False).returncode == 0


def test_export_is_the_plans_script(mixlaunch, cluster, write_profile):
    words = ["--nodes", "4", "--steps", "7", "--lr", "1e-5", "--name", "mine", "--time", "90", "--model", "/m"]
    result = mixlaunch("export", "finetune", "--cluster", write_profile(), *words)
    plan = jobs.plan_finetune(
        cluster, model="/m", ask=jobs.Ask(name="mine", nodes=4, time="90"), values={"steps": 7, "lr": 1e-5}
    )
    assert result.stdout == render.render(plan)


@pytest.mark.parametrize("job", jobs.PLANS)
def test_a_dry_run_shows_everything_and_touches_nothing(mixlaunch, home, job):
    more = {"tiny": ["--output", "/x"], "prepare": ["/x"], "download": ["--as-job"], "verify": ["/x"]}.get(job, [])
    result = mixlaunch(*typed(job), "--cluster", "selene", "--dry-run", *more)
    assert result.exit_code == 0, result.output
    for shown in ("selene", "config.yaml", "job.sbatch", "#SBATCH --partition=luna", f"megatron_mixtral {job}"):
        assert shown in result.stdout
    assert not list(home.iterdir())


def test_a_dry_run_says_layout_and_what_is_missing(mixlaunch):
    shown = mixlaunch("finetune", "--cluster", "selene", "--nodes", "4", "--dry-run").stdout
    assert "32 = 4 nodes x 8" in shown
    assert "32 ranks = TP1 x PP4 x CP1 x DP8, experts EP8 x ETP1" in shown
    assert "/lustre/fsw/mixlaunch/data/finetune.idx  (isn't there)" in shown


def test_every_setting_is_an_option_of_the_job_and_of_its_export():
    for job, config in JOBS.items():
        for command in (command_of(job), cli.commands["export"].commands[job]):
            offered = {opt for parameter in command.params for opt in parameter.opts}
            assert {option.flag for option in own(config)} <= offered


def test_export_offers_what_the_job_offers():
    starting = {
        "words",
        "--dry-run",
        "--wait",
        "--follow",
        "--as-job",
        "--force",
        "--tunnel",
        "--exclude",
        "--health-check",
    }
    for job in options.HELP:
        own = {o for p in command_of(job).params for o in p.opts} - {"words"}  # which are `convert`'s model
        offered = {o for p in cli.commands["export"].commands[job].params for o in p.opts}
        assert offered - {"--bundle"} == own - starting


@pytest.mark.parametrize(
    "words", [["finetune"], ["export", "serve"], ["clusters"], ["sandbox", "up"], ["logs"], ["plan"]]
)
def test_every_help_fits_eighty_columns(mixlaunch, words):
    result = mixlaunch(*words, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 110


def test_clusters_lists_what_there_is_and_what_is_wrong(mixlaunch, write_profile, tmp_path, monkeypatch):
    folder = tmp_path / "clusters"
    folder.mkdir()
    (folder / "broken.yaml").write_text(write_profile("partitoin: x").read_text())
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(folder))
    result = mixlaunch("clusters")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert {"local*", "selene", "sandbox", "broken"} <= set(lines)
    assert "unknown key 'partitoin'" in lines["broken"]


def test_clusters_show_prints_what_reads_back(mixlaunch, tmp_path):
    shown = mixlaunch("clusters", "show", "selene")
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout)
    assert mixlaunch("clusters", "show", str(again)).stdout == shown.stdout


def test_convert_has_a_command_under_it_and_stays_one(mixlaunch):
    assert "convert: what would run" in mixlaunch("convert", "--cluster", "selene", "--dry-run").stdout
    help = mixlaunch("convert", "--help").stdout
    assert "--layout [torch_dist|legacy]" in help
    assert "verify  Check a converted folder against its digests." in help
    wrong = mixlaunch("convert", "--cluster", "selene", "verify", "/x")
    assert (wrong.exit_code, "--cluster goes behind `convert verify`" in wrong.stderr) == (2, True)
    assert mixlaunch("convert", "verfy", "/x").exit_code == 2
    missing = mixlaunch("convert", "verify", "/nowhere/at/all")
    assert (missing.exit_code, "/nowhere/at/all doesn't exist" in missing.stderr) == (2, True)


@pytest.mark.parametrize(
    "words", [["--to", "hf", "a-run"], ["a-run", "--to", "hf"], ["--name", "a-run", "--to", "hf", "a-run"]]
)
def test_convert_takes_a_run_as_its_word(mixlaunch, words):
    shown = mixlaunch("convert", "--cluster", "selene", *words, "--dry-run").stdout
    assert "source: /lustre/fsw/mixlaunch/runs/a-run\n" in shown
    both = mixlaunch("convert", *words, "--model", "b")
    assert (both.exit_code, "'a-run' and --model: give one of them" in both.stderr) == (2, True)


def test_status_without_runs_says_so(mixlaunch):
    assert "no runs yet" in mixlaunch("status").stdout


def test_no_colour_when_not_a_terminal(mixlaunch):
    assert "\x1b" not in mixlaunch("finetune", "--cluster", "selene", "--dry-run").stdout


def terminal(*words: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    import pty

    master, slave = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "launcher", *words],
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **environment},
    ) as process:
        os.close(slave)
        written = b""
        while True:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # Linux's way of saying that the other side is closed
                break
            if not chunk:
                break
            written += chunk
        process.wait(timeout=30)
    os.close(master)
    return written.decode()


def test_colour_on_a_terminal_unless_unwanted(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in terminal("clusters", "list")
    assert "\x1b[31m" in terminal("finetune", "--cluster", "nowhere")
    plain = terminal("clusters", "show", "local", NO_COLOR="1")
    assert not any(f"\x1b[{code}m" in plain for code in (31, 32, 34, 36, 91, 94))
    assert "\x1b[31m" not in terminal("finetune", "--cluster", "nowhere", NO_COLOR="1")


SMALL = ["--layers", "1", "--hidden", "64", "--heads", "2", "--kv-heads", "1"]


def test_a_job_on_this_machine_runs_to_its_end(mixlaunch, home):
    made = mixlaunch("tiny", "--output", home / "model", *SMALL)
    assert made.exit_code == 0, made.output
    assert "tiny done" in made.stdout
    assert json.loads((home / "model" / "config.json").read_text())["num_hidden_layers"] == 1
    converted = mixlaunch("convert", "--model", home / "model", "--follow")
    assert converted.exit_code == 0, converted.output
    assert "model-megatron: complete" in converted.stdout  # the job's own words
    table = mixlaunch("status").stdout
    assert [line.split()[1] for line in table.splitlines()[1:]] == ["convert", "tiny"]  # the newest first
    assert "COMPLETED" in mixlaunch("status", "convert").stdout
    for words in (["logs"], ["logs", "-f"], ["logs", "convert", "--rank", "0", "--attempt", "0"]):
        assert "model-megatron: complete" in mixlaunch(*words).stdout
    assert mixlaunch("logs", "tiny", "--batch").stdout.endswith("done; exit 0\n")
    assert "there are: 0" in mixlaunch("logs", "--attempt", "7").stderr
    assert "has ended already" in mixlaunch("cancel", "tiny").stdout


def test_a_job_that_is_not_waited_for_can_be_cancelled(mixlaunch, home):
    (home / "text.txt").write_text("words\n")
    mixlaunch("tiny", "--output", home / "model", *SMALL)
    started = mixlaunch("prepare", home / "text.txt", "--model", home / "model", "--no-wait", "--name", "later")
    assert started.exit_code == 0
    assert "mixlaunch logs -f later-" in started.stdout
    assert mixlaunch("cancel", "later").exit_code == 0
    shown = mixlaunch("status", "later").stdout
    assert "CANCELLED" in shown or "COMPLETED" in shown  # it may have been quicker


def test_a_jobs_mistake_is_the_commands_mistake(mixlaunch, home):
    (home / "weights").mkdir()
    result = mixlaunch("convert", "--model", home / "weights")
    assert result.exit_code == 2
    assert "FAILED, exit 2" in result.stdout
    assert "config.json" in result.stdout  # the job's own words


def test_a_local_download_of_nothing_is_refused_by_the_job(mixlaunch, home, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (home / "taken").mkdir()
    Path(home / "taken" / "file").touch()
    done = launched("download", "me/model", "--output", str(home / "taken"))
    assert done.returncode == 2
    assert "holds something else" in done.stderr
