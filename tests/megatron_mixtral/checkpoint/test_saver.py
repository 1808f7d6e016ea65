"""Saves that are killed at any moment: a run goes on from its newest complete checkpoint, as if never stopped."""

import random
import signal
import time

import pytest
import run_job
from run_job import losses
from small_world import EP2_PP2, tensors_of
from spawn_ranks import ranks

from megatron_mixtral.weights import folder as weights_folder


def config_of(world, **more):
    return {
        "model": str(world),
        "data": str(world / "data"),
        "steps": 6,
        "sequence_length": 16,
        "micro_batch": 1,
        "global_batch": 4,
        "precision": "fp32",
        "lr": 0.01,
        "warmup_steps": 0,
        "eval_steps": 0,
        "save_interval": 1,
        **more,
    }


def train_here(raw, run_dir):
    from pathlib import Path

    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), Path(run_dir))


def test_saved_while_training_goes_on_is_what_a_pause_would_have_saved(world, tmp_path):
    """Every step is saved and the next one changes everything: values of two steps must not mix."""
    raw = config_of(world, layout={"expert": 2}, keep_checkpoints=10)
    for name in ("paused", "going_on"):
        ranks(2, train_here, raw | {"async_save": name == "going_on"}, str(tmp_path / name))
    for step in range(1, 7):
        a, b = (tensors_of(tmp_path / name / f"checkpoints/iter_{step:07}") for name in ("paused", "going_on"))
        assert len(a) > 30
        assert all((a[name] == b[name]).all() for name in a)
    saves = [e for e in run_job.events.read(tmp_path / "going_on/events.jsonl") if e["event"] == "checkpoint"]
    assert [e["step"] for e in saves] == list(range(1, 7))
    assert all(e["pause"] < e["seconds"] for e in saves[:-1])
    assert all(e["bytes"] > 100_000 for e in saves)


def newest(run_dir):
    found = weights_folder.newest(run_dir / "checkpoints")
    return int(found.name.removeprefix("iter_")) if found else 0


def kill_in_a_save(config, run_dir, count, draw):
    """One attempt that is killed, one rank first, at a random moment of its first, second or third save."""
    before = newest(run_dir)
    with run_job.Job("finetune", config, run_dir, ranks=count) as job:
        start = job.wait_for("start", attempt=0, step=before)
        step = min(before + draw.randint(1, 3), config["steps"])
        job.wait_for("saving", step=step)
        time.sleep(draw.uniform(0, 0.25))
        job.signal(draw.randrange(count), signal.SIGKILL)
    assert start["step"] == before, "it went on from something else than the newest complete checkpoint"


def killed(world, folder, *, kills, count, layout, seed):
    """A run that is killed `kills` times, saved in both ways by turns, ends as the one that was left alone."""
    draw = random.Random(seed)
    config = config_of(world, layout=layout, steps=4 + 6 * kills)  # however far each attempt gets
    whole = run_job.run("finetune", config | {"save_interval": 1000}, folder / "whole", ranks=count)
    run_dir = folder / "run"
    resumed = 0
    while resumed < kills:
        if newest(run_dir) >= config["steps"] - 3:
            break
        kill_in_a_save(config | {"async_save": bool(resumed % 2)}, run_dir, count, draw)
        resumed += 1
    assert resumed >= min(kills, 2)
    end = run_job.run("finetune", config, run_dir, ranks=count)
    assert losses(end) == losses(whole)
    name = f"checkpoints/iter_{config['steps']:07}"
    a, b = tensors_of(folder / "whole" / name), tensors_of(run_dir / name)
    assert all((a[name] == b[name]).all() for name in a)
    return resumed


def test_killed_in_the_middle_of_saves(world, tmp_path):
    killed(world, tmp_path, kills=2, count=1, layout={}, seed=time.time_ns())


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_killed_fifty_times_in_the_middle_of_saves(world, tmp_path):
    assert killed(world, tmp_path / "one", kills=35, count=1, layout={}, seed=1) == 35
    assert killed(world, tmp_path / "four", kills=15, count=4, layout=EP2_PP2, seed=2) == 15


def resume_long(raw, run_dir):
    """A run of two steps, then one that goes on until what it went on from is thrown away."""
    train_here(raw | {"steps": 2}, run_dir)
    train_here(raw | {"steps": 5}, run_dir)


def test_the_model_is_described_in_every_checkpoint_however_often_it_was_resumed(world, tmp_path):
    ranks(1, resume_long, config_of(world), str(tmp_path))
    kept = sorted((tmp_path / "checkpoints").glob("iter_*"))
    assert [path.name for path in kept] == ["iter_0000004", "iter_0000005"]
    wanted = (world / "config.json").read_bytes()
    assert all((path / "config.json").read_bytes() == wanted for path in kept)
