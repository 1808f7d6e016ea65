"""Training adapters as a job: they learn, nothing else changes, and a run goes on as if never stopped."""

import shutil
import signal

import pytest
import run_job
from run_job import losses
from small_world import make_world, tensors_of, training

from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.weights import lora as adapters


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One whose weights are large enough for adapters to learn."""
    return make_world(tmp_path_factory.mktemp("world"), initializer_range=0.1)


@pytest.fixture
def config(world):
    return training(world, lr=0.02, eval_steps=0, save_interval=4, lora=4)


def test_adapters_learn_and_any_layout_goes_on_with_them(config, tmp_path, world):
    config |= {"lora_experts": True}
    whole = run_job.run("finetune", config, tmp_path / "whole")
    found = losses(whole)
    assert found[8] < found[1] - 0.2
    assert "training adapters of attention and experts, rank 4, alpha 8: 8,448 parameters beside 47,520" in (
        whole.output()
    )
    shape, lora = MixtralShape.from_folder(world), adapters.Lora(rank=4, alpha=8, experts=True)
    saved = tensors_of(tmp_path / "whole/checkpoints/iter_0000004")
    own = {name for name in saved if not name.startswith("optimizer.")}
    assert own == set(adapters.shapes(shape, lora))
    assert {name.partition(".adapters.")[2] for name in saved} == {name.partition(".adapters.")[2] for name in own}

    def go_on(run, layout, count):
        shutil.copytree(tmp_path / "whole", run)
        shutil.rmtree(run / "checkpoints/iter_0000008")
        return run_job.run("finetune", {**config, "layout": layout, "recompute": "full"}, run, ranks=count)

    other = go_on(tmp_path / "other", {"expert": 2, "pipeline": 2}, 4)
    assert other.events("load")[-1]["path"].endswith("iter_0000004")
    assert losses(other) == pytest.approx(found, abs=1e-5)


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(config, tmp_path):
    config |= {"lora_dropout": 0.2}
    whole = run_job.run("finetune", config, tmp_path / "whole")
    with run_job.Job("finetune", config, tmp_path / "run") as first:
        first.wait_for("step", step=2)
        first.signal(0, signal.SIGUSR2)
        assert first.wait() == [85], first.output()
    second = run_job.run("finetune", config, tmp_path / "run")
    assert losses(second) == losses(whole)
    a, b = (tensors_of(tmp_path / name / "checkpoints/iter_0000008") for name in ("whole", "run"))
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


def test_a_run_goes_on_with_what_it_began_with_alone(config, tmp_path):
    run = tmp_path / "run"
    run_job.run("finetune", {**config, "steps": 4}, run)
    other = run_job.Job("finetune", {k: v for k, v in config.items() if k != "lora"}, run)
    assert other.wait() == [2]
    assert "trained adapters of attention, rank 4, alpha 8; it can't go on with the whole model" in other.output()
