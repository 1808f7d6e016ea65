"""Shared by the core's tests: the real Mixtral tokenizer in a hub folder, made once."""

import pytest
import torch

# Models are small: threads that wait for one another on busy cores took most of the time.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from megatron_mixtral.jobs import tiny

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def words(tokenizer_folder):
    from megatron_mixtral.tokenization import tokenizer

    return tokenizer.load(tokenizer_folder)


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """(hub folder, converted folder) of the small Mixtral that servers are tested with."""
    import run_job
    import small_server

    folder = tmp_path_factory.mktemp("served")
    hub = small_server.make_model(folder / "hub")
    run_job.run("convert", {"source": str(hub), "output": str(folder / "megatron")}, folder / "convert")
    return hub, folder / "megatron"


@pytest.fixture(scope="session")
def plain_server(served_model, tmp_path_factory):
    """One server for all who only ask: starting one takes longer than most of their tests."""
    import small_server

    with small_server.server(tmp_path_factory.mktemp("plain"), served_model[1], queue=64) as server:
        yield server


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A small model to train, and data to train it on."""
    from small_world import make_world

    return make_world(tmp_path_factory.mktemp("world"))
