"""`plan`, the check before every submission, and `pipeline`: as they are typed, without a Slurm."""

import json
import stat

import pytest
from click.testing import CliRunner

from launcher.cli.main import cli
from launcher.planning import jobs
from launcher.runs import find
from launcher.submit import pipeline

BIG = ("--model", "mistralai/Mixtral-8x22B-v0.1")


@pytest.fixture
def mixlaunch():
    """Run a command; its exit code, stdout and stderr."""

    def run(*words):
        result = CliRunner().invoke(cli, [str(w) for w in words], prog_name="mixlaunch")
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


def test_plan_prints_the_equation_and_all_that_follows(mixlaunch):
    told = mixlaunch("plan", "finetune", "--cluster", "selene", "--nodes", "4")
    assert told.exit_code == 0
    for said in (
        "32 = TP 1 x PP 4 x CP 1 x DP 8",
        "32 = ETP 1 x EP 8 x PP 4 x expert DP 1",
        "8 / 8 = 1 a rank",
        "32 / 4 = 8 a stage",
        "1,048,576 = 256 x 4096",
        "8.6% of a step = (PP 4 - 1) / (32 micro batches + PP 4 - 1)",
        "inside one NVLink domain",
        "49.8 of 80 GiB, stage 1 of 4: weights 3.5, gradients 7.0, optimizer 16.4, activations 22.5",
        "verdict        fits",
    ):
        assert said in told.stdout


def test_plan_as_json_has_the_same_in_numbers(mixlaunch):
    told = json.loads(mixlaunch("plan", "finetune", "--cluster", "selene", "--nodes", "4", "--json").stdout)
    assert told["fits"]
    assert told["layout"] | {"data": 8, "expert_data": 1} == told["layout"]
    assert told["stages"][0]["total"] == sum(v for k, v in told["stages"][0].items() if k not in ("stage", "total"))
    assert told["gpu_bytes"] == 80 * 2**30


@pytest.mark.parametrize(
    ("words", "near"),
    [
        (["finetune", "--nodes", "3"], "--nodes 4"),
        (["finetune", "--nodes", "3"], "--pp 3"),  # uneven stages
        (["finetune", "--nodes", "4", *BIG], "--tp 8 --recompute full"),
        (["serve", "--pp", "1"], "--pp 2"),
        (["convert", "--ep", "3"], "--ep 4"),
        (["finetune", "--nodes", "4", "--pp", "99"], "--pp 4"),
        (["finetune", "--nodes", "4", "--ep", "16"], "--ep 8"),
        (["serve", "--max-tokens", "99999"], "--max-tokens 32768"),
    ],
)
def test_what_does_not_fit_is_exit_2_with_the_nearest(mixlaunch, words, near):
    told = mixlaunch("plan", *words, "--cluster", "selene")
    assert told.exit_code == 2
    assert near in told.stderr.partition("Nearest that fit:")[2]
    answer = mixlaunch("plan", *words, "--cluster", "selene", "--json")
    assert answer.exit_code == 2
    assert answer.stderr == ""
    told = json.loads(answer.stdout)
    assert not told["fits"]
    assert near in [one["options"] for one in told["nearest"]]


def test_four_gpus_a_node_are_warned_of_experts_on_two_nodes(mixlaunch, write_profile):
    profile = write_profile("node: {gpus: 4, cpus: 64, gpu_memory_gb: 80, nvlink_domain: 4}")
    words = ("finetune", "--cluster", profile, "--nodes", "8")
    told = mixlaunch("plan", *words)
    assert "warning: each group of 8 ranks spans 2 NVLink domains: 32 KiB a token and layer" in told.stdout
    assert "note: EP traffic: each group of 8 ranks spans 2 NVLink domains" in mixlaunch("export", *words).stderr


def test_a_submission_that_memory_cannot_hold_is_refused(mixlaunch, home):
    words = ("finetune", "--cluster", "selene", "--nodes", "4", *BIG)
    refused = mixlaunch(*words)
    assert refused.exit_code == 2
    assert "it doesn't fit: stage 1 of 4 needs 131.3 GiB" in refused.stderr
    assert "Nearest that fit:" in refused.stderr
    assert "--force" in refused.stderr
    forced = mixlaunch(*words, "--force")
    assert "weights: /lustre" in forced.stderr  # what is refused next
    assert not list(home.iterdir())


def test_arithmetic_cannot_be_forced(mixlaunch):
    refused = mixlaunch("finetune", "--cluster", "selene", "--nodes", "3", "--force")
    assert refused.exit_code == 2
    assert "0.75, not whole" in refused.stderr


def test_a_dry_run_shows_the_same_and_ends_as_the_submission_would(mixlaunch):
    shown = mixlaunch("finetune", "--cluster", "selene", "--nodes", "4", "--dry-run")
    assert shown.exit_code == 0
    assert "49.8 of 80 GiB" in shown.stdout
    shown = mixlaunch("finetune", "--cluster", "selene", "--nodes", "4", *BIG, "--dry-run")
    assert shown.exit_code == 2
    assert "DOESN'T FIT" in shown.stdout


def test_an_unknown_model_is_told_to_be_unchecked(mixlaunch):
    told = mixlaunch("export", "finetune", "--cluster", "selene", "--nodes", "4", "--model", "me/Mine")
    assert told.exit_code == 0
    assert told.stderr == "note: memory isn't checked: the model's shape isn't known here\n"


def test_a_model_that_is_here_is_known_by_its_own_description(mixlaunch, home):
    (home / "model").mkdir()
    sizes = {
        "model_type": "mixtral",
        "num_hidden_layers": 4,
        "num_local_experts": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    sizes |= {"intermediate_size": 64, "hidden_size": 32, "vocab_size": 100, "num_experts_per_tok": 2}
    (home / "model" / "config.json").write_text(json.dumps(sizes))
    told = mixlaunch("plan", "finetune", "--cluster", "selene", "--model", home / "model", "--ep", "4", "--pp", "3")
    assert "4 / 4 = 1 a rank" in told.stdout
    assert "4 / 3 = 2, 1, 1 by stage" in told.stdout
    refused = mixlaunch("plan", "finetune", "--cluster", "selene", "--model", home / "model")
    assert "experts / EP = 4 / 8 isn't whole" in refused.stderr


# Pipelines


@pytest.fixture
def chain(cluster, monkeypatch, home):
    """The steps of a pipeline on a cluster where nothing is there yet."""
    monkeypatch.chdir(home)

    def plan(*files, profile=cluster, **more) -> pipeline.Pipeline:
        return pipeline.plan(profile, files=files, axes=jobs.Axes(), ask=more.pop("ask", jobs.Ask()), **more)

    return plan


def names(chain):
    return {step.name: [other.name for other in step.after(chain.jobs)] for step in chain.jobs}


def test_steps_follow_those_that_make_their_inputs(chain):
    assert names(chain("a.txt")) == {
        "download": [],
        "convert": ["download"],
        "prepare": ["download"],
        "finetune": ["convert", "prepare"],
        "export": ["finetune"],
    }
    assert list(names(chain())) == ["download", "convert", "finetune", "export"]
    assert list(names(chain(model="finetune-2026"))) == ["finetune", "export"]


def test_what_is_there_is_left_out(chain, cluster, home):
    paths = cluster.paths.model_copy(update={"models": str(home / "models")})
    mine = cluster.model_copy(update={"paths": paths})
    hub = home / "models" / "Mixtral-8x7B-v0.1"
    hub.mkdir(parents=True)
    (hub / "config.json").write_text("{}")
    (hub / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (hub / "1.safetensors").touch()
    assert "download" in names(chain(profile=mine)), "half of it is there"
    (hub / "2.safetensors").touch()
    assert list(names(chain(profile=mine))) == ["convert", "finetune", "export"]
    (home / "models" / "Mixtral-8x7B-v0.1-megatron" / "release").mkdir(parents=True)
    (home / "models" / "Mixtral-8x7B-v0.1-megatron" / "release" / "mixlaunch.json").touch()
    made = chain(profile=mine)
    assert list(names(made)) == ["finetune", "export"]
    assert [name for name, _ in made.there] == ["convert"]


def test_a_name_heads_every_step_and_one_ending_joins_them(chain):
    made = chain(ask=jobs.Ask(name="mine", nodes=4, time="90"))
    assert [step.plan.name for step in made.jobs] == [
        "mine-download",
        "mine-convert",
        "mine-finetune",
        "mine-export",
    ]
    assert len({step.path.name.removeprefix(step.plan.name) for step in made.jobs}) == 1
    assert [step.plan.time for step in made.jobs] == ["04:00:00", "04:00:00", "90", "04:00:00"]


def test_a_pipeline_that_cannot_be_is_refused_whole(mixlaunch, home):
    words = ("pipeline", "--cluster", "selene")
    assert "0.75, not whole" in mixlaunch(*words, "--nodes", "3").stderr
    refused = mixlaunch(*words, "--nodes", "4", *BIG)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: finetune: it doesn't fit: stage 1 of 4")
    refused = mixlaunch(*words, "--nodes", "4", "/no/such/text")
    assert "prepare: text: /no/such/text doesn't exist" in refused.stderr
    refused = mixlaunch(*words, "--nodes", "4")
    assert "finetune: data: /lustre/fsw/mixlaunch/data/finetune.idx doesn't exist" in refused.stderr
    assert "weights:" not in refused.stderr, "an earlier step makes them"
    assert not list(home.iterdir())


@pytest.mark.parametrize(("fails", "ran"), [("none", 4), ("convert", 2)])
def test_on_this_machine_one_step_runs_after_another(mixlaunch, home, monkeypatch, fails, ran):
    """With a rank that only leaves what the next step looks for."""
    python = home / "python"
    python.write_text(f'#!/bin/bash\necho "$4 ran"\n[ "$4" != {fails} ] || exit 2\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("MIXLAUNCH_PYTHON", str(python))
    (home / "d.idx").touch()
    done = mixlaunch("pipeline", "--model", "me/Model", "--data", home / "d")
    assert done.exit_code == (2 if fails != "none" else 0), done.output
    started = find.every([home / "state" / "mixlaunch" / "runs"])
    assert sorted(run.record["pipeline"]["step"] for run in started) == list(range(1, ran + 1))


def test_the_dry_run_of_a_pipeline_touches_nothing(mixlaunch, home):
    (home / "a.txt").write_text("words")
    shown = mixlaunch("pipeline", home / "a.txt", "--cluster", "selene", "--nodes", "4", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "after          convert, prepare" in shown.stdout
    assert "Mixtral-8x7B-v0.1-megatron  (convert makes it)" in shown.stdout
    assert [path.name for path in home.iterdir()] == ["a.txt"]
