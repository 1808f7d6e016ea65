"""`--check-logits`: what was converted computes as what it was made of, whole or by layers, or it's refused."""

import re
from pathlib import Path

import hub_folders
import pytest
from conversion import run

from megatron_mixtral.checkpoint import compare_logits
from megatron_mixtral.errors import CheckpointError, InputError
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.weights import legacy
from megatron_mixtral.weights.tensors import Names

CASES = {
    "hub": {},
    "fused, tied, window, head_dim": {
        "names": Names(block="mlp", fused=True),
        "tie_word_embeddings": True,
        "sliding_window": 5,
        "head_dim": 8,
        "dtype": "float16",
    },
}


@pytest.fixture(params=["whole models", "layer by layer"])
def how(request, monkeypatch):
    if request.param == "layer by layer":
        monkeypatch.setattr(compare_logits, "available", lambda: 0)
    return request.param


def said(capsys):
    found = re.search(
        r"logits of (\d+) tokens: largest difference (\S+), largest logit (\S+) \((.*)\)", capsys.readouterr().out
    )
    assert found
    return int(found[1]), float(found[2]), float(found[3]), found[4]


@pytest.mark.parametrize("case", CASES)
def test_both_ways_compute_what_transformers_does(tmp_path, capsys, how, case):
    hub_folders.write(tmp_path / "hub", shards=2, **{"dtype": "float32", **CASES[case]})
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path, check_logits=True)
    for way in ("there", "back"):
        if way == "back":
            run(tmp_path / "megatron", tmp_path / "back", tmp_path, to="hf", check_logits=True)
        tokens, off, largest, found = said(capsys)
        assert (tokens, found) == (16, how)
        assert 0 < off < 1e-4 * largest


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounded_weights_are_compared_as_they_were_rounded(tmp_path, capsys, how, dtype):
    hub_folders.write(tmp_path / "hub", dtype="float32")
    run(tmp_path / "hub", tmp_path / "megatron", tmp_path, dtype=dtype, check_logits=True)
    _, off, largest, _ = said(capsys)
    assert off < 1e-4 * largest


def test_legacy_files_of_many_ranks_are_compared_too(tmp_path, capsys, how):
    hub_folders.write(tmp_path / "hub", num_hidden_layers=3)
    layout = Layout(tensor=2, expert_tensor=2, expert=2, pipeline=2)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, format=legacy.KIND, layout=layout, check_logits=True)
    _, off, largest, _ = said(capsys)
    assert off < 1e-4 * largest


def test_widths_that_no_grouped_product_takes_are_compared_too(tmp_path, capsys):
    hub_folders.write(tmp_path / "hub", intermediate_size=7, hidden_size=18, head_dim=6)
    run(tmp_path / "hub", tmp_path / "out", tmp_path, check_logits=True)
    _, off, largest, _ = said(capsys)
    assert off < 1e-4 * largest


def test_a_model_that_transformers_has_no_logits_of_is_told_so(tmp_path):
    """Its weights convert; rotation wants an even head size."""
    hub_folders.write(tmp_path / "hub", head_dim=5)
    with pytest.raises(InputError, match=r"hub: transformers can't load it.*even"):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, check_logits=True)
    run(tmp_path / "hub", tmp_path / "out", tmp_path)


def test_other_weights_are_refused_and_get_no_name(tmp_path, how, monkeypatch):
    """Two experts change places on the way: nothing but the numbers can tell."""
    from megatron_mixtral.weights import plan, tensors

    hub_folders.write(tmp_path / "hub")

    def mixed_up(*args):
        for link in tensors.links(*args):
            if link.megatron.name.endswith("linear_fc2.weight") and link.megatron.index in ((1, 0), (1, 1)):
                other = (1, 1 - link.megatron.index[1])
                moved = tensors.Rows(link.megatron.name, other, link.megatron.start, link.megatron.stop)
                link = tensors.RowLink(link.hub, moved)
            yield link

    with monkeypatch.context() as patched:
        patched.setattr(plan, "links", mixed_up)
        with pytest.raises(
            CheckpointError, match=r"largest difference .*: more than 0.001 of it; the weights differ"
        ):
            run(tmp_path / "hub", tmp_path / "out", tmp_path, check_logits=True)
    assert not (tmp_path / "out").exists()


def test_a_prompt_is_in_the_models_own_tokens(tmp_path, capsys):
    from megatron_mixtral.jobs import tiny
    from megatron_mixtral.spec.jobs import TinyConfig

    tiny.make(TinyConfig(output=str(tmp_path / "hub"), layers=1, hidden=32, intermediate=32, heads=4, experts=2))
    run(tmp_path / "hub", tmp_path / "out", tmp_path, check_logits=True, prompt="The cat sat")
    tokens, off, largest, _ = said(capsys)
    assert tokens == 4  # <s> The cat sat
    assert off < 1e-4 * largest


def test_a_tolerance_of_nothing_is_missed(tmp_path):
    hub_folders.write(tmp_path / "hub")
    with pytest.raises(CheckpointError, match="more than 0 of it"):
        run(tmp_path / "hub", tmp_path / "out", tmp_path, check_logits=True, tolerance=0.0)


def test_memory_that_a_control_group_leaves_counts(tmp_path):
    groups = Path("/proc/self/cgroup").read_text().splitlines()
    folder = tmp_path / next(line[3:] for line in groups if line.startswith("0::")).strip("/")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text("3000\n")
    (folder / "memory.current").write_text("1000\n")
    assert compare_logits._left_in_groups(tmp_path) == [2000]
