"""Weights & Biases as it is installed, offline: what it has is what the run tells, and it never ends a run."""

import pytest
from spawn_ranks import ranks

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec.jobs import FinetuneConfig
from megatron_mixtral.training import recorders

wandb = pytest.importorskip("wandb")
CONFIG = FinetuneConfig(model="m", data="d", wandb_project="mixtral")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    wandb.teardown()


def told(run_dir):
    """What every attempt has left, as bytes: numbers are JSON in it."""
    wandb.teardown()  # `finish` may come back before its service has written all
    return [file.read_bytes() for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]


def test_each_attempt_writes_its_steps_under_one_name(tmp_path):
    run_dir = tmp_path / "run:1"
    run_dir.mkdir()
    for step, loss in ((1, 3.25), (2, 3.125)):
        recorder = recorders.Recorder(CONFIG, run_dir, writes=True)
        recorder.record(step, {"loss": loss, "expert_load": 1.5})
        recorder.record(step, {"validation_loss": loss + 1})
        recorder.close()
    first, second = told(run_dir)
    for content, numbers in ((first, (b"3.25", b"4.25")), (second, (b"3.125", b"4.125"))):
        assert all(part in content for part in (b"run-1", b"mixtral", b"validation_loss", *numbers))
    assert b"3.25" not in second


def test_other_ranks_write_nothing(tmp_path):
    recorder = recorders.Recorder(CONFIG, tmp_path, writes=False)
    recorder.record(1, {"loss": 1.0})
    recorder.close()
    assert not list(tmp_path.iterdir())


def test_a_service_that_cannot_be_reached_costs_no_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    recorders.check(CONFIG)
    recorder = recorders.Recorder(CONFIG, tmp_path, writes=True)
    recorder.record(1, {"loss": 1.0})
    recorder.close()
    assert capfd.readouterr().err.count("warning: Weights & Biases: ") == 1


def lose_the_service(run_dir):
    """One process, whose own service is killed after the first step; whether it still reports after the next."""
    from pathlib import Path

    import psutil

    recorder = recorders.Recorder(CONFIG, Path(run_dir), writes=True)
    recorder.record(1, {"loss": 1.0})
    (service,) = psutil.Process().children()
    service.kill()
    service.wait()
    for step in range(2, 5):
        recorder.record(step, {"loss": 1.0})
    recorder.close()
    return recorder._wandb is None


def test_a_service_that_is_gone_costs_no_run(tmp_path):
    assert ranks(1, lose_the_service, str(tmp_path)) == [True]


@pytest.mark.parametrize(
    ("mode", "project", "words"),
    [
        ("online", "mixtral", "WANDB_API_KEY isn't set; put it into the run's secrets.env"),
        ("offline", "a/b", "'a/b': at most 128 characters, none of"),
        ("offline", "x" * 129, "at most 128 characters"),
    ],
)
def test_what_is_missing_is_named_first(monkeypatch, mode, project, words):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(InputError) as caught:
        recorders.check(FinetuneConfig(model="m", data="d", wandb_project=project))
    assert words in str(caught.value)
