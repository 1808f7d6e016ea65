"""Shared by the core's tests: the real Mixtral tokenizer in a hub folder, made once."""

import pytest


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from megatron_mixtral import tiny

    folder = tmp_path_factory.mktemp("tokenizer")
    tiny.write_tokenizer(folder)
    return folder
