"""Training as a job: it learns, it stops when asked, and it goes on as if it had never stopped."""

import json
import signal

import numpy as np
import pytest
import run_job
from run_job import losses
from small_world import EP2_PP2, SHAPE, make_weights, tensors_of, training
from spawn_ranks import ranks


@pytest.fixture
def config(world):
    return training(world, lr=0.01, eval_interval=4, eval_steps=2, save_interval=100)


def stop_after(job, step, rank):
    job.wait_for("step", step=step)
    job.signal(rank, signal.SIGUSR2)
    assert set(job.wait()) == {85}, job.output()
    return job.events("checkpoint")[-1]["step"]


def test_loss_falls_and_everything_is_told(config, tmp_path):
    done = run_job.run("finetune", {**config, "steps": 40}, tmp_path / "run")
    steps = done.events("step")
    assert [e["step"] for e in steps] == list(range(1, 41))
    assert steps[0]["loss"] > 4.0
    assert steps[-1]["loss"] < 1.0
    assert steps[0]["lr"] == 0.005
    assert steps[-1]["lr"] == 1e-5
    assert all(e["grad_norm"] > 0 and e["tokens_per_s"] > 0 and 0.9 < e["aux_loss"] < 4 for e in steps)
    assert [e["step"] for e in done.events("eval")] == list(range(4, 41, 4))
    assert done.events("eval")[-1]["loss"] < 1.0
    assert done.events("exit")[-1]["code"] == 0
    assert (tmp_path / "run/checkpoints/iter_0000040/mixlaunch.json").exists()
    output = done.outputs[0].read_text()
    assert "step 40/40 | loss 0." in output
    assert "training loss\n" in output


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(config, tmp_path):
    whole = run_job.run("finetune", config, tmp_path / "whole")
    with run_job.Job("finetune", config, tmp_path / "run") as first:
        assert 2 <= stop_after(first, 2, rank=0) < 8
    second = run_job.run("finetune", config, tmp_path / "run")
    assert losses(second) == losses(whole)
    a, b = (tensors_of(tmp_path / name / "checkpoints/iter_0000008") for name in ("whole", "run"))
    assert a.keys() == b.keys()
    assert len(a) > 30
    assert all((a[name] == b[name]).all() for name in a)


def test_ranks_leave_together_and_any_layout_goes_on(config, tmp_path):
    one = run_job.run("finetune", config, tmp_path / "one")
    parallel = {**config, "layout": EP2_PP2}
    with run_job.Job("finetune", parallel, tmp_path / "run", ranks=4) as first:
        stop_after(first, 2, rank=3)  # one rank alone gets the signal
    assert losses(first) == pytest.approx({s: v for s, v in losses(one).items() if s in losses(first)}, abs=1e-5)
    second = run_job.run("finetune", {**config, "layout": {"expert": 2}}, tmp_path / "run", ranks=2)
    assert losses(second) == pytest.approx(losses(one), abs=1e-5)
    assert second.events("eval")[-1]["loss"] == pytest.approx(one.events("eval")[-1]["loss"], abs=1e-5)


def test_parallel_resume_is_bit_for_bit(config, tmp_path):
    parallel = {**config, "layout": EP2_PP2}
    whole = run_job.run("finetune", parallel, tmp_path / "whole", ranks=4)
    with run_job.Job("finetune", parallel, tmp_path / "run", ranks=4) as first:
        stop_after(first, 3, rank=1)
    second = run_job.run("finetune", parallel, tmp_path / "run", ranks=4)
    assert losses(second) == losses(whole)
    a, b = (tensors_of(tmp_path / name / "checkpoints/iter_0000008") for name in ("whole", "run"))
    assert all((a[name] == b[name]).all() for name in a)


def transformers_loss(folder, data, samples):
    """Mean validation loss of the exported model, by transformers."""
    import torch
    from transformers import MixtralForCausalLM

    from megatron_mixtral.data import dataset

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = dataset.Documents(data)
    divided = dataset.split(len(documents), 0.1, 1234)
    validation = dataset.Samples(documents, divided.validation, 32, 1234, pad=True)
    ids, mask = (torch.from_numpy(np.stack(parts)) for parts in zip(*(validation[n] for n in samples), strict=True))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    learnt = mask[:, 1:].flatten()
    return float((losses * learnt).sum() / learnt.sum())


def test_trained_weights_export_to_transformers_with_the_same_loss(config, tmp_path, world):
    trained = run_job.run("finetune", {**config, "layout": EP2_PP2, "steps": 4}, tmp_path / "run", ranks=4)
    export = {"source": str(tmp_path / "run"), "output": str(tmp_path / "hf"), "to": "hf"}
    run_job.run("convert", export, tmp_path / "export")
    found = transformers_loss(tmp_path / "hf", world / "data", range(16))
    assert found == pytest.approx(trained.events("eval")[-1]["loss"], abs=1e-4)


def test_no_evaluation_when_none_is_wanted(config, tmp_path):
    done = run_job.run("finetune", {**config, "steps": 4, "eval_steps": 0}, tmp_path / "run")
    assert not done.events("eval")


def test_a_signal_while_the_job_still_loads_ends_it_with_nothing_lost(config, tmp_path):
    with run_job.Job("finetune", config, tmp_path / "run") as job:
        job.wait_for("load")
        job.signal(0, signal.SIGUSR2)
        assert job.wait() == [85]
    resumed = run_job.run("finetune", config, tmp_path / "run")
    assert sorted(losses(resumed)) == list(range(1, 9))


def test_a_finished_run_has_nothing_more_to_do(config, tmp_path):
    run_job.run("finetune", config, tmp_path / "run")
    again = run_job.run("finetune", config, tmp_path / "run")
    assert len(again.events("step")) == 8
    assert len(again.events("checkpoint")) == 1


def test_checkpoints_are_kept_by_number(config, tmp_path):
    run_job.run("finetune", {**config, "save_interval": 2, "steps": 7}, tmp_path / "run")
    kept = sorted(p.name for p in (tmp_path / "run/checkpoints").glob("iter_*"))
    assert kept == ["iter_0000006", "iter_0000007"]


def test_updates_that_are_not_finite_are_skipped_and_end_the_run(config, tmp_path, world):
    folder = tmp_path / "poisoned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SHAPE))
    ranks(1, make_weights, folder, "final_layernorm", 3e38)  # finite, but its products aren't
    with run_job.Job(
        "finetune", {**config, "model": str(folder), "steps": 20, "save_interval": 2}, tmp_path / "run"
    ) as job:
        assert job.wait() == [1]
    assert len(job.events("step")) == 5
    assert job.events("step")[-1]["loss"] == "nan"
    assert job.events("step")[-1]["skipped"] == 5
    assert "the last 5 updates were skipped" in job.output()
    assert not list((tmp_path / "run").glob("checkpoints/iter_*"))
    # Fewer than end it: an optimizer that has never updated anything can be saved, too.
    few = run_job.run("finetune", {**config, "model": str(folder), "steps": 2}, tmp_path / "few")
    assert [e["step"] for e in few.events("checkpoint")] == [2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": "many"}, "steps: 'many' isn't a whole number"),
        ({"stepz": 3}, "there is no setting 'stepz'; did you mean steps?"),
        ({"data": "/nowhere/data"}, "/nowhere/data.idx: no such file"),
        ({"lr": 1e-6}, "lr: 1e-06 is below min_lr, 1e-05"),
    ],
)
def test_mistakes_end_with_2_and_one_line(config, tmp_path, change, message):
    with run_job.Job("finetune", {**config, **change}, tmp_path / "run") as job:
        assert job.wait() == [2]
    assert message in job.output()
    assert "Traceback" not in job.output()
    assert not (tmp_path / "run/checkpoints").exists()
