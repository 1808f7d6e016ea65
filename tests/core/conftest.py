"""Shared by the core's tests: the real Mixtral tokenizer in a hub folder, made once."""

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from megatron_mixtral import tiny

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """(hub folder, converted folder) of the small Mixtral that servers are tested with."""
    import jobs
    import serving

    folder = tmp_path_factory.mktemp("served")
    hub = serving.make_model(folder / "hub")
    jobs.run("convert", {"source": str(hub), "output": str(folder / "megatron")}, folder / "convert")
    return hub, folder / "megatron"


@pytest.fixture(scope="session")
def plain_server(served_model, tmp_path_factory):
    """One server for all who only ask: starting one takes longer than most of their tests."""
    import serving

    with serving.server(tmp_path_factory.mktemp("plain"), served_model[1], queue=64) as server:
        yield server


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A converted model, and data in which each token tells the next: cycles of 64 tokens with varying strides."""
    import json

    import numpy as np
    from ranks import ranks
    from small import SHAPE, make_weights

    from megatron_mixtral import indexed

    folder = tmp_path_factory.mktemp("world")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    ranks(1, make_weights, folder)
    random = np.random.default_rng(1)
    lengths = random.integers(40, 200, size=60).astype(np.int32)
    tokens = [(np.arange(n) * 5 + random.integers(64)) % 64 for n in lengths]
    np.concatenate(tokens).astype(np.uint16).tofile(folder / "data.bin")
    indexed.write_index(folder / "data.idx", lengths, np.dtype(np.uint16))
    return folder
