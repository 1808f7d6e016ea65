"""Pipelines on the real Slurm: the chain with real parts, and what is left when a step or a submission fails.

`mixlaunch pipeline chats.jsonl --cluster selene --nodes 4` of the README is this, with selene's size.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fake_hub import serving
from running import story, wait_until

from launcher.cli import pipeline as pipeline_command
from launcher.cli import status
from launcher.errors import Interrupted, SubmitError, UsageError
from launcher.planning import jobs
from launcher.runs import find, report, states
from launcher.submit import pipeline, start
from megatron_mixtral.jobs.tiny import make
from megatron_mixtral.spec.jobs import TinyConfig

REPO = "mistralai/Mixtral-8x7B-v0.1"
STEPS = ["download", "convert", "prepare", "finetune", "export"]


@pytest.fixture
def chain(cluster, stub, tmp_path):
    """A pipeline whose ranks do what `does` says; "$4" is the job's name, $MIXLAUNCH_ATTEMPT the try."""
    (tmp_path / "text.jsonl").write_text('{"text": "words"}\n')

    def plan(does: str, **more) -> pipeline.Pipeline:
        profile = cluster.model_copy(
            update={"python": stub(does), "node": cluster.node.model_copy(update={"gpus": 2}), **more}
        )
        files = (str(tmp_path / "text.jsonl"),)
        axes, ask = jobs.Axes(pipeline=1, expert=2), jobs.Ask(nodes=1)
        return pipeline.plan(profile, files=files, model="me/Model", axes=axes, ask=ask, values={"global_batch": 8})

    return plan


def outcome(started):
    return {
        run.job if run.job != "convert" else run.name.split("-")[0]: states.of_run(run).state for run in started
    }


def ended(started):
    wait_until(lambda: not any(states.of_run(run).active for run in started), 90, started[0])


def test_each_step_waits_for_those_that_make_its_inputs(chain, site):
    """Also through a warning, a save and 85: what counts is the attempt that ends well."""
    does = '[ "$4$MIXLAUNCH_ATTEMPT" != finetune0 ] || exit 85'
    started = pipeline.submit(chain(does), asked=["pipeline"])
    ids = {name: run.job_id for name, run in zip(STEPS, started, strict=True)}
    after = {name: list(run.record["pipeline"]["jobs"]) for name, run in zip(STEPS, started, strict=True)}
    assert after == {
        "download": [],
        "convert": [ids["download"]],
        "prepare": [ids["download"]],
        "finetune": [ids["convert"], ids["prepare"]],
        "export": [ids["finetune"]],
    }
    told = site.host.call("scontrol", "--oneliner", "show", "job", ids["export"])
    assert f"Dependency=afterok:{ids['finetune']}" in told
    assert "dependency" not in (started[4].path / "job.sbatch").read_text()  # it can be submitted again by hand
    wait_until(lambda: states.of_run(started[4]).reason == "Dependency", 30, started[0])
    [known] = report.Reporter()([started[4]])
    assert status.note(known) == f"step 5 of 5, after {started[3].name}"
    ended(started)
    assert set(outcome(started).values()) == {"COMPLETED"}, story(started[3])
    assert len(list((started[3].path / "logs").glob("attempt_*"))) == 2


def test_a_failing_first_step_leaves_nothing_queued(chain, site):
    started = pipeline.submit(chain('[ "$4" != download ] || exit 2'), asked=[])
    ended(started)
    assert outcome(started) == {"download": "FAILED", **dict.fromkeys(STEPS[1:], "CANCELLED")}
    assert not site.host.call("squeue", "--noheader", "--me").strip()
    assert all(not list((run.path / "logs").glob("attempt_*")) for run in started[1:]), "a later step ran"


def test_waiting_ends_with_the_first_failure_and_cancels_the_rest(chain, capsys):
    started = pipeline.submit(chain('[ "$4" != convert ] || exit 2'), asked=[])
    assert pipeline_command.to_the_end(started) == 2
    ended(started)
    assert outcome(started)["export"] == "CANCELLED"


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (SubmitError("sbatch: no more jobs\nNothing was submitted."), "prepare: sbatch: no more jobs"),
        (KeyboardInterrupt(), "prepare: interrupted"),
    ],
)
def test_when_a_submission_fails_the_earlier_steps_are_taken_back(chain, monkeypatch, failure, said):
    submit, made = start.run, []

    def third_fails(plan, **more):
        if len(made) == 2:
            raise failure
        made.append(submit(plan, **more))
        return made[-1]

    monkeypatch.setattr(start, "run", third_fails)
    with pytest.raises(Interrupted if isinstance(failure, KeyboardInterrupt) else SubmitError) as caught:
        pipeline.submit(chain("sleep 30"), asked=[])
    message = str(caught.value)
    assert message.startswith(said)
    for run in made:
        assert f"{run.name}, job {run.job_id}, is cancelled again" in message
    ended(made)
    assert set(outcome(made).values()) == {"CANCELLED"}


def test_what_can_never_start_is_found_and_cancelled(chain, site, monkeypatch):
    """As where Slurm leaves such jobs in the queue for ever."""
    kept = property(lambda plan: [f"--dependency=afterok:{':'.join(plan.link.jobs)}"] if plan.link.jobs else [])
    monkeypatch.setattr(jobs.JobPlan, "queue_options", kept)
    started = pipeline.submit(chain('[ "$4" != download ] || exit 2'), asked=[])
    wait_until(lambda: states.of_run(started[1]).reason == states.NEVER, 60, started[0])
    found = states.stuck(started)
    assert {run.name for run in found} == {run.name for run in started[1:]}
    for run in found:
        states.cancel(run)
    ended(started)
    assert not site.host.call("squeue", "--noheader", "--me").strip()


def test_nothing_is_submitted_unless_every_step_can_be(chain, cluster, tmp_path):
    made = chain("exit 0")
    (tmp_path / "text.jsonl").unlink()
    with pytest.raises(UsageError, match=r"^prepare: text: .*text.jsonl doesn't exist$"):
        pipeline.check(made, force=False)
    assert not list(Path(cluster.paths.runs).iterdir())


@pytest.mark.timeout(600)
def test_the_whole_chain_with_real_parts(site, tmp_path):
    """From the hub to an export in the hub's layout, in one command."""
    for name in ("models", "data", "runs"):
        (tmp_path / name).mkdir()
    profile = {
        "scheduler": "slurm",
        "slurm_conf": str(site.slurm_conf),
        "time": "10",
        "node": {"gpus": 2, "cpus": 64, "memory_gb": 512},
        "python": sys.executable,
        "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1},
        "paths": {name: str(tmp_path / name) for name in ("models", "data", "runs")},
        "signal_lead": 30,
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(profile))
    texts = [{"text": f"Document {n} says what {n} and {n} make: {2 * n}. " * 4} for n in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    make(TinyConfig(output=str(tmp_path / "hub"), layers=2, hidden=64, intermediate=64, heads=4, kv_heads=2))
    files = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    sizes = ("--sequence-length", "32", "--global-batch", "4", "--steps", "2", "--precision", "fp32")
    with serving(files, repository=REPO) as hub:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        words = [
            "pipeline",
            "text.jsonl",
            "--cluster",
            "small.yaml",
            "--nodes",
            "1",
            "--pp",
            "1",
            "--ep",
            "2",
            "--wait",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "launcher", *words, *sizes, "--output", str(tmp_path / "out"), "--name", "mine"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    started = sorted(find.every([tmp_path / "runs"]), key=lambda run: run.record["pipeline"]["step"])
    assert [run.name.split("-")[1] for run in started] == STEPS
    assert len({run.name.split("-", 2)[2] for run in started}) == 1  # one ending for all
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["num_hidden_layers"] == 2
    again = subprocess.run(
        [sys.executable, "-m", "launcher", *words[:-1], *sizes, "--dry-run"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "convert left out" in again.stdout
    assert "1 prepare" in again.stdout
