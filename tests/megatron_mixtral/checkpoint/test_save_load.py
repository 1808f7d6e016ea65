"""Checkpoints across layouts, bit for bit; optimizer state with them; and every kind of damage refused by name."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from spawn_ranks import ranks

SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 67,
}
TRAINED_ON = {"expert": 2, "pipeline": 2}  # and two data-parallel replicas of all but the experts


def start(folder, layout, **options):
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape

    layout, shape = Layout(**layout), MixtralShape.from_folder(Path(folder))
    ranks.initialize(layout, timeout=60, seed=5)
    return build.build(shape, layout, precision="fp32", **options)


def write_random(folder):
    """One rank: random weights into `folder/release`."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.weights import tensors

    from megatron.core.dist_checkpointing.dict_utils import nested_values

    model = start(folder, {})
    save_load.save(Path(folder) / "release", model, assets=Path(folder))
    kinds = {"tensors": {}, "objects": {}}
    for value in nested_values(model.sharded_state_dict()):
        kinds["tensors" if hasattr(value, "dtype") else "objects"][value.key] = value.global_shape
    ranks.shutdown()
    return kinds, tensors.shapes(model.shape), tensors.extra_states(model.shape)


def save_at(folder, layouts):
    """Load the release at each layout and save it again from there."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks

    for name, layout in layouts.items():
        model = start(folder, layout, random_weights=False)
        save_load.load_weights(model, Path(folder) / "release")
        save_load.save(Path(folder) / name, model)
    ranks.shutdown()


def read_back(folder, names):
    """One rank: all parameters of each of the weights folders."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks

    model, read = start(folder, {}, random_weights=False), {}
    for name in names:
        for parameter in model.parameters():
            parameter.data.fill_(float("nan"))
        save_load.load_weights(model, Path(folder) / name)
        read[name] = {key: value.detach().clone().numpy() for key, value in model.named_parameters()}
    ranks.shutdown()
    return read


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "config.json").write_text(json.dumps(SHAPE))
    kinds, shapes, extra_states = ranks(1, write_random, str(folder))[0]
    assert kinds["tensors"] == shapes
    assert kinds["objects"] == extra_states
    return folder


RESAVED = {
    "pp2": {"pipeline": 2},
    "ep2": {"expert": 2},
    "tp2": {"tensor": 2},
    "tp2_etp2": {"tensor": 2, "expert_tensor": 2},
}


def test_weights_keep_their_bits_through_every_layout(release):
    ranks(2, save_at, str(release), RESAVED)
    read = ranks(1, read_back, str(release), ["release", *RESAVED])[0]
    for name in RESAVED:
        for key, wanted in read["release"].items():
            assert (read[name][key] == wanted).all(), (name, key)


def load_as_upstream(folder):
    """megatron-core's own loader at its strictest, asking for all that a Transformer Engine model asks for."""
    from megatron_mixtral.mcore import ranks

    from megatron.core import dist_checkpointing

    model = start(folder, {"pipeline": 2}, random_weights=False)
    asked = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(asked, str(Path(folder) / "release"), strict="raise_all")
    objects = [key for key, value in loaded["model"].items() if value is None]
    ranks.shutdown()
    return loaded["checkpoint_version"], len(objects)


def test_upstream_loads_it_at_its_strictest(release):
    a_layer = 3 + 2 * SHAPE["num_local_experts"]  # the empty objects of Transformer Engine's modules
    assert ranks(2, load_as_upstream, str(release)) == [(3.0, 2 * a_layer), (3.0, 2 * a_layer + 1)]


def trainer(folder, layout):
    """The model wrapped and its distributed optimizer, as training makes them."""
    from megatron_mixtral.spec.jobs import FinetuneConfig
    from megatron_mixtral.training import optimizer

    config = FinetuneConfig(model="", data="", lr=1e-2, warmup_steps=0, precision="fp32", steps=100)
    return optimizer.build(config, start(folder, layout, aux_loss=1e-2, calculate_per_token_loss=True))


def train(parts, first, count):
    """Mean losses of `count` steps on made-up tokens, the same whatever the layout."""
    import torch

    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.training import optimizer

    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    rank, replicas = ranks.data_parallel()
    losses = []
    for number in range(first, first + count):
        tokens = torch.randint(0, 67, (4, 17), generator=torch.Generator().manual_seed(number % 2))
        mine = iter(tokens[rank::replicas].split(1))

        def step(iterator, chunk):
            ids = next(iterator)
            out = chunk(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:].contiguous())
            return out, lambda x: (x.sum(), torch.tensor(x.numel(), dtype=torch.int), {"sum": x.detach().sum()})

        optimizer.zero_grad(parts)
        optimizer.set_step(parts, number + 1)
        result = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=mine,
            model=parts.chunks,
            num_microbatches=4 // replicas,
            seq_length=16,
            micro_batch_size=1,
            forward_only=False,
        )
        assert optimizer.step(parts)[0]
        total = torch.tensor([float(sum(part["sum"] for part in result)) if result else 0.0])
        torch.distributed.all_reduce(total)
        losses.append(float(total) / 64 / parallel_state.get_tensor_model_parallel_world_size())
    return losses


def train_and_save(folder):
    """Four ranks: three steps, a save, three more."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks

    from megatron.core import parallel_state

    parts = trainer(folder, TRAINED_ON)
    before = train(parts, 0, 3)
    place = parallel_state.get_pipeline_model_parallel_rank()
    save_load.save(
        Path(folder) / "iter_0000003",
        parts.chunks[0],
        parts.optimizer,
        step=3,
        common={"samples": 12},
        rank_state={"stage": place},
        assets=Path(folder),
    )
    after = train(parts, 3, 3)
    ranks.shutdown()
    return before, after


def resume(folder, layout):
    """Load that save at `layout` and go on for three steps."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks

    parts = trainer(folder, layout)
    state = save_load.load_training(parts.chunks[0], parts.optimizer, Path(folder) / "iter_0000003")
    losses = train(parts, 3, 3)
    ranks.shutdown()
    return losses, state.step, state.common, state.rank


@pytest.fixture(scope="module")
def trained(release):
    (before, after), *others = ranks(4, train_and_save, str(release), timeout=180)
    assert all(other == (before, after) for other in others)
    assert after[-1] < before[0] - 0.3, "it learns nothing, so it can tell nothing"
    return after


def test_training_resumes_exactly_at_its_layout(release, trained):
    for rank, (losses, step, common, own) in enumerate(ranks(4, resume, str(release), TRAINED_ON, timeout=180)):
        assert losses == trained
        assert (step, common, own) == (3, {"samples": 12}, {"stage": rank // 2})


@pytest.mark.parametrize(("world", "layout"), [(1, {}), (2, {"expert": 2}), (2, {"tensor": 2, "expert_tensor": 2})])
def test_training_resumes_at_another_layout(release, trained, world, layout):
    for losses, step, common, own in ranks(world, resume, str(release), layout):
        assert losses == pytest.approx(trained, abs=1e-5)
        assert (step, common, own) == (3, {"samples": 12}, None)


# Damage: each function spoils a copy of the release and says what the error must name.


def _forget(name):
    def spoil(metadata):
        del metadata.state_dict_metadata[name]

    return spoil


def _rename(old, new):
    def spoil(metadata):
        metadata.state_dict_metadata[new] = metadata.state_dict_metadata[old]

    return spoil


def _reshape(name):
    def spoil(metadata):
        entry = metadata.state_dict_metadata[name]
        entry.size = type(entry.size)((*entry.size[:-1], entry.size[-1] + 1))

    return spoil


def _lose_a_layer(name):
    def spoil(metadata):
        metadata.state_dict_metadata[name].chunks.pop()

    return spoil


ROUTER = "decoder.layers.mlp.router.weight"
METADATA_DAMAGE = {
    "missing tensor": (_forget(ROUTER), f"tensor {ROUTER} missing"),
    "unexpected tensor": (
        _rename(ROUTER, "decoder.layers.mlp.gate.weight"),
        "unexpected tensor decoder.layers.mlp.gate",
    ),
    "misshapen tensor": (_reshape(ROUTER), f"tensor {ROUTER} has shape (4, 4, 33), the model needs (4, 4, 32)"),
    "lost layer": (_lose_a_layer(ROUTER), f"tensor {ROUTER} has 384 of its 512 elements"),
}


def _truncate(folder):
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    return "__0_0.distcp: truncated"


def _delete(folder):
    (folder / "__0_0.distcp").unlink()
    return "__0_0.distcp: missing"


def _spoil_metadata(folder):
    (folder / ".metadata").write_bytes(b"\\x80\\x04nonsense")
    return ".metadata"


def _unmark(folder):
    (folder / "mixlaunch.json").unlink()
    return "mixlaunch.json"


def _from_the_future(folder):
    (folder / "mixlaunch.json").write_text('{"format": 99}')
    return "format 99"


FILE_DAMAGE = [_truncate, _delete, _spoil_metadata, _unmark, _from_the_future]


def errors_of(folder, names):
    """What loading says of each weights folder; one rank."""
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.errors import CheckpointError
    from megatron_mixtral.mcore import ranks

    model, said = start(folder, {}), {}
    for name in names:
        before = [parameter.detach().clone() for parameter in model.parameters()]
        try:
            save_load.load_weights(model, Path(folder) / name)
        except CheckpointError as error:
            said[name] = str(error)
        same = zip(before, model.parameters(), strict=True)
        assert all((old == new).all() for old, new in same), "an error after parameters had changed"
    ranks.shutdown()
    return said


def test_damage_is_refused_by_name_before_anything_changes(release, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    wanted = {}
    for number, (spoil, message) in enumerate(METADATA_DAMAGE.values()):
        folder = shutil.copytree(release / "release", tmp_path / f"metadata_{number}")
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        spoil(metadata)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        wanted[folder.name] = message
    for spoil in FILE_DAMAGE:
        folder = shutil.copytree(release / "release", tmp_path / spoil.__name__)
        wanted[folder.name] = spoil(folder)
    said = ranks(1, errors_of, str(tmp_path), list(wanted))[0]
    assert said.keys() == wanted.keys()
    for name, message in wanted.items():
        assert message in said[name]
        assert str(tmp_path / name) in said[name]


def save_twice(folder):
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.errors import CheckpointError
    from megatron_mixtral.mcore import ranks

    model, target = start(folder, {"pipeline": 2}), Path(folder) / "checkpoints" / "iter_0000007"
    if os.environ["RANK"] == "0":
        target.mkdir(parents=True)
        (target / "__9_0.distcp").write_text("left by a save that was killed")
    save_load.save(target, model, step=7)
    try:
        save_load.save(target, model, step=7)
    except CheckpointError as error:
        return sorted(path.name for path in target.iterdir()), str(error)
    finally:
        ranks.shutdown()


def test_a_save_clears_what_a_killed_one_left_and_is_never_overwritten(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    for files, error in ranks(2, save_twice, str(tmp_path)):
        assert files == [
            ".metadata",
            "__0_0.distcp",
            "__1_0.distcp",
            "common.pt",
            "metadata.json",
            "mixlaunch.json",
        ]
        assert "iter_0000007: already holds a complete checkpoint" in error
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["iter_0000007", "latest_checkpointed_iteration.txt"]
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "7"


def test_a_file_in_the_way_of_a_save_is_named_and_stays(tmp_path):
    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.errors import CheckpointError

    (tmp_path / "iter_0000007").write_text("mine")
    with pytest.raises(CheckpointError, match="iter_0000007: a file, but a checkpoint must be saved here"):
        save_load._claim(tmp_path / "iter_0000007")
    assert (tmp_path / "iter_0000007").read_text() == "mine"
