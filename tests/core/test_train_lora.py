"""Training adapters as a job: they learn, nothing else changes, and a run goes on as if never stopped."""

import json
import shutil
import signal

import jobs
import numpy as np
import pytest
from ranks import ranks
from test_train import SHAPE, losses, make_weights, tensors_of

from megatron_mixtral import adapters, indexed
from megatron_mixtral.config import MixtralShape


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A converted model, and data in which each token tells the next."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "config.json").write_text(json.dumps({**SHAPE, "initializer_range": 0.1}))
    ranks(1, make_weights, folder)
    random = np.random.default_rng(1)
    lengths = random.integers(40, 200, size=60).astype(np.int32)
    tokens = [(np.arange(n) * 5 + random.integers(64)) % 64 for n in lengths]
    np.concatenate(tokens).astype(np.uint16).tofile(folder / "data.bin")
    indexed.write_index(folder / "data.idx", lengths, np.dtype(np.uint16))
    return folder


@pytest.fixture
def config(world):
    return {
        "model": str(world),
        "data": str(world / "data"),
        "steps": 8,
        "sequence_length": 32,
        "micro_batch": 2,
        "global_batch": 8,
        "precision": "fp32",
        "lr": 0.02,
        "warmup_steps": 2,
        "validation": 0.1,
        "eval_steps": 0,
        "save_interval": 4,
        "lora": 4,
    }


def test_adapters_learn_and_any_layout_goes_on_with_them(config, tmp_path, world):
    config |= {"lora_experts": True}
    whole = jobs.run("finetune", config, tmp_path / "whole")
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
        return jobs.run("finetune", {**config, "layout": layout, "recompute": "full"}, run, ranks=count)

    other = go_on(tmp_path / "other", {"expert": 2, "pipeline": 2}, 4)
    assert other.events("load")[-1]["path"].endswith("iter_0000004")
    assert losses(other) == pytest.approx(found, abs=1e-5)


def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(config, tmp_path):
    config |= {"lora_dropout": 0.2}
    whole = jobs.run("finetune", config, tmp_path / "whole")
    with jobs.Job("finetune", config, tmp_path / "run") as first:
        first.wait_for("step", step=2)
        first.signal(0, signal.SIGUSR2)
        assert first.wait() == [85], first.output()
    second = jobs.run("finetune", config, tmp_path / "run")
    assert losses(second) == losses(whole)
    a, b = (tensors_of(tmp_path / name / "checkpoints/iter_0000008") for name in ("whole", "run"))
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)


def test_a_run_goes_on_with_what_it_began_with_alone(config, tmp_path):
    run = tmp_path / "run"
    jobs.run("finetune", {**config, "steps": 4}, run)
    other = jobs.Job("finetune", {k: v for k, v in config.items() if k != "lora"}, run)
    assert other.wait() == [2]
    assert "trained adapters of attention, rank 4, alpha 8; it can't go on with the whole model" in other.output()
