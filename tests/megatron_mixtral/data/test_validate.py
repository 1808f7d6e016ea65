"""What would make a training run pointless is named before its first step, and nothing is written."""

import json
import shutil

import numpy as np
import pytest
from small_world import SHAPE, make_weights
from spawn_ranks import ranks

from megatron_mixtral.data import indexed

BASE = {
    "steps": 2,
    "sequence_length": 32,
    "micro_batch": 2,
    "global_batch": 8,
    "precision": "fp32",
    "warmup_steps": 0,
    "validation": 0.1,
}


def outcomes(cases, folder):
    """One process: what `finetune` says of each configuration, by the error's kind, words and exit code."""
    from pathlib import Path

    from megatron_mixtral.errors import JobError
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    said = {}
    for name, raw in cases.items():
        run_dir = Path(folder) / name
        run_dir.mkdir()
        try:
            loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), run_dir)
            said[name] = (0, "")
        except JobError as error:
            said[name] = (error.exit_code, str(error))
        assert not (run_dir / "checkpoints").exists(), name
    return said


def write(prefix, documents, mask=None):
    lengths = np.array([len(d) for d in documents], dtype=np.int32)
    np.concatenate(documents).astype(np.uint16).tofile(f"{prefix}.bin")
    indexed.write_index(prefix.with_name(prefix.name + ".idx"), lengths, np.dtype(np.uint16))
    if mask is not None:
        np.full(lengths.sum(), mask, dtype=np.uint8).tofile(f"{prefix}_mask.bin")
        indexed.write_index(prefix.with_name(prefix.name + "_mask.idx"), lengths, np.dtype(np.uint8))
    return str(prefix)


def test_everything_that_poisons_a_run_is_named_before_it_starts(world, tmp_path, tokenizer_folder):
    plain = [np.arange(50) % 64 for _ in range(20)]
    strange = [d.copy() for d in plain]
    strange[13][7] = 64
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    (poisoned / "config.json").write_text(json.dumps(SHAPE))
    ranks(1, make_weights, poisoned, "layers.1.mlp.router")
    with_words = tmp_path / "with_words"
    shutil.copytree(world, with_words)
    shutil.copy(tokenizer_folder / "tokenizer.model", with_words / "release")
    other = write(tmp_path / "other", plain)
    (tmp_path / "other.json").write_text(json.dumps({"vocab_size": 64, "tokenizer": "of another model"}))
    larger = write(tmp_path / "larger", plain)
    (tmp_path / "larger.json").write_text(json.dumps({"vocab_size": 32000, "tokenizer": "x"}))
    torn = write(tmp_path / "torn", plain)
    (tmp_path / "torn.idx").write_bytes((tmp_path / "torn.idx").read_bytes()[:60])
    undescribed = write(tmp_path / "undescribed", plain)
    (tmp_path / "undescribed.json").write_text('{"vocab_size": 6')
    empty = write(tmp_path / "empty", [np.array([], dtype=np.int64)])
    cases = {
        "strange token": ({"data": write(tmp_path / "strange", strange)}, "document 13 holds token 64, but"),
        "few": (
            {"data": write(tmp_path / "few", plain[:5])},
            "6 sequences of 32 tokens are less than one batch of 8",
        ),
        "tiny": ({"data": write(tmp_path / "tiny", [plain[0][:9]])}, "9 tokens in 1 documents are less than one"),
        "empty": ({"data": empty}, "empty.bin: no tokens in it"),
        "torn": ({"data": torn}, "torn.idx: damaged: it doesn't have a length for each of its 20 documents"),
        "half a description": ({"data": undescribed}, "undescribed.json: damaged"),
        "no data": ({"data": "/nowhere/data"}, "/nowhere/data.idx: no such file"),
        "no model": ({"model": "/nowhere"}, "/nowhere: no such folder"),
        "nothing learnt": ({"data": write(tmp_path / "zeros", plain, 0)}, "no token is to be learnt"),
        "all learnt": ({"data": write(tmp_path / "ones", plain, 1)}, "every token, questions too, is to be learnt"),
        "NaN": ({"model": str(poisoned)}, "parameter decoder.layers.1.mlp.router.weight holds NaN or infinity"),
        "other tokenizer": ({"data": other, "model": str(with_words)}, "a tokenizer that differs from"),
        "larger vocabulary": ({"data": larger}, "prepared with 32000 tokens, but the model knows 64"),
        "batch": ({"global_batch": 7}, "global_batch: 7 = micro batch 2 x DP 1 x 3.5 accumulated steps"),
        "long": ({"sequence_length": 100000}, "less than one sequence of 100000"),
    }
    base = {**BASE, "model": str(world), "data": str(world / "data")}
    said = ranks(1, outcomes, {name: base | change for name, (change, _) in cases.items()}, str(tmp_path))[0]
    for name, (_, wanted) in cases.items():
        code, words = said[name]
        assert code == 2, name
        assert wanted in words, name


def on_all_ranks(raw, folder):
    """What each of several ranks says of one configuration."""
    from pathlib import Path

    from megatron_mixtral.errors import JobError
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    with pytest.raises(JobError) as said:
        loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), Path(folder))
    return str(said.value)


def test_what_one_rank_finds_ends_all_with_the_same_words(world, tmp_path):
    """The poisoned layer lies on the second pipeline stage alone."""
    poisoned = tmp_path / "poisoned"
    poisoned.mkdir()
    (poisoned / "config.json").write_text(json.dumps(SHAPE))
    ranks(1, make_weights, poisoned, "final_layernorm")
    raw = {**BASE, "model": str(poisoned), "data": str(world / "data"), "layout": {"pipeline": 2}}
    said = ranks(2, on_all_ranks, raw, str(tmp_path))
    assert said[0] == said[1]
    assert "final_layernorm.weight holds NaN" in said[0]


def resume_changed(raw, changes, folder):
    """One process: a run of two steps, then what it says to going on with each change."""
    from pathlib import Path

    from megatron_mixtral.errors import JobError
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    def go(values):
        loop.train(checks.parse(jobs.FinetuneConfig, values, where="config"), Path(folder))

    go(raw)
    said = []
    for change in changes:
        with pytest.raises(JobError) as error:
            go(raw | {"steps": 4} | change)
        said.append((error.value.exit_code, str(error.value)))
    go(raw | {"steps": 3})
    return said


def test_a_run_goes_on_with_the_data_it_began_with_or_not_at_all(world, tmp_path):
    other = [np.arange(50) % 64 for _ in range(60)]
    raw = {**BASE, "model": str(world), "data": str(world / "data"), "freeze_router": True}
    changes = [
        {"data": write(tmp_path / "other", other)},
        {"seed": 9},
        {"sequence_length": 16},
        {"packing": "documents"},
        {"freeze_router": False},
    ]
    said = ranks(1, resume_changed, raw, changes, str(tmp_path))[0]
    assert [code for code, _ in said] == [2] * 5
    for (_, words), wanted in zip(
        said,
        [
            "other tokens than when this run began",
            "seed 9 in place of 1234",
            "sequence_length 16 in place of 32",
            "packing documents in place of stream",
            "rank 0: it has no optimizer.state.param.decoder.layers.mlp.router.weight",
        ],
        strict=True,
    ):
        assert wanted in words
