"""A damaged checkpoint ends a run on all ranks before its first step, a failed save ends it there; both by name."""

import os
import resource
import shutil
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import hub_folders
import pytest
import torch
from spawn_ranks import ranks

from megatron_mixtral.jobs import convert
from megatron_mixtral.spec.jobs import ConvertConfig


def config_of(world):
    return {
        "model": str(world),
        "data": str(world / "data"),
        "layout": {"pipeline": 2},
        "steps": 4,
        "sequence_length": 16,
        "micro_batch": 1,
        "global_batch": 2,
        "precision": "fp32",
        "warmup_steps": 0,
        "eval_steps": 0,
        "save_interval": 2,
    }


def train_on(raw, run_dir):
    """(exit code, words) of `finetune` in this process, whose ranks stay together for the next one."""
    from megatron_mixtral.errors import JobError
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    ranks.shutdown = lambda: None
    try:
        loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), Path(run_dir))
    except JobError as error:
        return error.exit_code, str(error)
    return 0, ""


def train_in(raw, run_dirs):
    """What this rank says in each of `run_dirs`, and how long it took to say it."""
    said = []
    for run_dir in run_dirs:
        begun = time.monotonic()
        said.append((*train_on(raw, run_dir), time.monotonic() - begun))
    return said


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run with complete checkpoints of steps 2 and 4, and its configuration."""
    folder = tmp_path_factory.mktemp("trained")
    raw = config_of(world)
    assert ranks(2, train_on, raw, str(folder)) == [(0, "")] * 2
    return folder, raw


def _shard(folder, rank=1):
    return folder / f"__{rank}_0.distcp"


def truncated(folder):
    os.truncate(_shard(folder), _shard(folder).stat().st_size // 2)
    return "__1_0.distcp"


def shortened_by_a_byte(folder):
    os.truncate(_shard(folder), _shard(folder).stat().st_size - 1)
    return "__1_0.distcp"


def a_flipped_bit(folder):
    path = _shard(folder, 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)
    return "__0_0.distcp: damaged"


def deleted(folder):
    _shard(folder).unlink()
    return "__1_0.distcp"


def swapped(folder):
    _shard(folder, 0).rename(folder / "x")
    _shard(folder, 1).rename(_shard(folder, 0))
    (folder / "x").rename(_shard(folder, 1))
    return ".distcp"


def another_steps_shard(folder):
    shutil.copy(_shard(folder.with_name("iter_0000002")), _shard(folder))
    return "__1_0.distcp"


def no_metadata(folder):
    (folder / ".metadata").unlink()
    return ".metadata"


def flipped_metadata(folder):
    data = bytearray((folder / ".metadata").read_bytes())
    data[-40] ^= 1
    (folder / ".metadata").write_bytes(data)
    return ".metadata"


def flipped_common(folder):
    data = bytearray((folder / "common.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "common.pt").write_bytes(data)
    return "common.pt: damaged"


def a_marker_alone(folder):
    for path in folder.iterdir():
        if path.name not in ("mixlaunch.json", "config.json"):
            path.unlink()
    return ".metadata"


def a_torn_marker(folder):
    (folder / "mixlaunch.json").write_bytes((folder / "mixlaunch.json").read_bytes()[:40])
    return "mixlaunch.json"


def a_marker_of_nothing(folder):
    (folder / "mixlaunch.json").write_text('{"format": 1}')
    return "holds only None"


DAMAGE = [
    *(truncated, shortened_by_a_byte, a_flipped_bit, deleted, swapped, another_steps_shard),
    *(no_metadata, flipped_metadata, flipped_common, a_marker_alone, a_torn_marker, a_marker_of_nothing),
]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_damaged_checkpoint_is_named_on_all_ranks_before_the_first_step(trained, tmp_path):
    folder, raw = trained
    wanted = []
    for spoil in DAMAGE:
        copy = shutil.copytree(folder, tmp_path / spoil.__name__)
        wanted.append(spoil(copy / "checkpoints/iter_0000004"))
    copies = [tmp_path / spoil.__name__ for spoil in DAMAGE]
    for said in ranks(2, train_in, raw | {"steps": 6}, [str(c) for c in copies]):
        for (code, words, seconds), name in zip(said, wanted, strict=True):
            assert code == 2
            assert name in words
            assert seconds < 30
    for copy, (_, words, _) in zip(copies, said, strict=True):
        assert "to continue from iter_0000002 instead, remove" in words
        assert (copy / "events.jsonl").read_bytes() == (folder / "events.jsonl").read_bytes(), "something was done"
        assert contents(copy / "checkpoints/iter_0000002") == contents(folder / "checkpoints/iter_0000002")


def train_from(raw, models, folder):
    """What this rank says of starting from each of `models`."""
    return [train_on(raw | {"model": model}, f"{folder}/{number}") for number, model in enumerate(models)]


def spoil(folder, pattern, wanted, better):
    """A copy of a converted folder in which the bytes `wanted` of the one file that has them are others."""
    copy = shutil.copytree(folder, folder.with_name(f"{folder.name}-{better.hex()[:8]}-spoilt"))
    (path,) = [p for p in copy.rglob(pattern) if wanted in p.read_bytes()]
    path.write_bytes(path.read_bytes().replace(wanted, better))
    return str(copy)


def test_converted_weights_that_have_changed_are_named_before_the_first_step(world, tmp_path):
    hub_folders.write(tmp_path / "hub", num_hidden_layers=2, max_position_embeddings=32)
    (tmp_path / "hub" / "tokenizer.model").unlink()  # it isn't one, and training reads it
    for source, to in (("hub", "megatron"), ("megatron", "hf")):
        convert.run(ConvertConfig(source=str(tmp_path / source), output=str(tmp_path / to), to=to), tmp_path)
    row = hub_folders.read(tmp_path / "hub")["model.layers.1.self_attn.v_proj.weight"][5]
    sound = row.view(torch.uint8).numpy().tobytes()
    flipped = bytes([sound[0] ^ 1]) + sound[1:]
    models = [
        str(tmp_path / "megatron"),
        spoil(tmp_path / "megatron", "*.distcp", sound, flipped),
        spoil(tmp_path / "hf", "*.safetensors", sound, flipped),
        spoil(tmp_path / "megatron", "config.json", b'"num_experts_per_tok": 2', b'"num_experts_per_tok": 1'),
    ]
    words = ["", *["tensor model.layers.1.self_attn.v_proj.weight: not what was converted"] * 2]
    words.append("config.json: num_experts_per_tok is 1, and was 2 at the conversion")
    for said in ranks(2, train_from, config_of(world) | {"steps": 1}, models, str(tmp_path / "runs")):
        for (code, told), wanted in zip(said, words, strict=True):
            assert code == (2 if wanted else 0), told
            assert wanted in told


def train_on_a_full_disk(raw, folder, full, limit):
    """Two steps; two more while rank `full` can't write files over `limit` bytes; and again when it can."""
    from megatron_mixtral.checkpoint import writer

    said = [train_on(raw | {"steps": 2}, folder)]
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    begun = time.monotonic()
    if os.environ["RANK"] == str(full):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    writer.shutil = SimpleNamespace(disk_usage=lambda folder: SimpleNamespace(free=0))
    said.append(train_on(raw, folder))
    resource.setrlimit(resource.RLIMIT_FSIZE, none)
    seconds = time.monotonic() - begun
    newest = sorted(path.parent.name for path in Path(folder).glob("checkpoints/*/mixlaunch.json"))
    said.append(train_on(raw, folder))
    return said, seconds, newest


@pytest.mark.parametrize(
    ("full", "limit", "asynchronous"),
    [(1, 20_000, False), pytest.param(0, 20_000, False, marks=pytest.mark.soak), (1, 20_000, True)],
)
def test_a_save_that_fails_on_one_rank_ends_all_and_leaves_the_last_one(world, tmp_path, full, limit, asynchronous):
    raw = config_of(world) | {"async_save": asynchronous}
    for said, seconds, newest in ranks(2, train_on_a_full_disk, raw, str(tmp_path), full, limit):
        first, failed, again = said
        assert first == again == (0, "")
        assert failed[0] == 1
        by_torch = f"iter_0000004: rank {full}: " in failed[1] and failed[1].endswith(": No space left on device")
        assert by_torch or f"rank {full}: [Errno 27]" in failed[1]
        assert seconds < 30
        assert newest == ["iter_0000002"]


def test_a_read_only_disk_is_named(trained, tmp_path):
    folder, raw = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    place = copy / "checkpoints"
    if os.geteuid():
        place.chmod(0o555)
        undo = ["chmod", "755", str(place)]
    else:
        mount = subprocess.run(["mount", "--bind", str(place), str(place)], capture_output=True, check=False)
        if mount.returncode:
            pytest.skip("root without the right to mount")
        subprocess.run(["mount", "-o", "remount,bind,ro", str(place)], check=True)
        undo = ["umount", str(place)]
    try:
        said = ranks(2, train_on, raw | {"steps": 6}, str(copy))
    finally:
        subprocess.run(undo, check=True)
    assert said[0] == said[1]
    assert said[0][0] == 1
    assert "Read-only" in said[0][1] or "Permission denied" in said[0][1]
    assert contents(place / "iter_0000004") == contents(folder / "checkpoints/iter_0000004")
