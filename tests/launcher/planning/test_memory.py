"""The launcher's memory formula against what is really allocated: models and optimizers of every kind of rank.

They are built on the meta device, in a pretended group of as many ranks as the layout has; a training of two real
ranks shows that a step holds no more than they do.
"""

import dataclasses

import pytest
from spawn_ranks import ranks

from launcher import errors as launcher_errors
from launcher.cluster import profile
from launcher.planning import fit, memory
from launcher.planning.memory import ServingWork, TrainingWork
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import PUBLISHED, MixtralShape

SMALL = MixtralShape(
    num_hidden_layers=7,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=96,
    hidden_size=64,
    head_dim=24,  # not hidden / heads
    vocab_size=131,  # odd: tensor parallelism pads it
)
LAYOUTS = [  # model, layout, world
    ("8x7B", {"pipeline": 4, "expert": 8}, 32),
    ("8x7B", {"pipeline": 2, "expert": 4}, 32),
    ("8x7B", {"tensor": 2, "pipeline": 2, "expert": 8}, 32),
    ("8x7B", {"tensor": 4, "expert": 2, "expert_tensor": 4}, 8),
    ("8x7B", {}, 1),
    ("8x22B", {"pipeline": 8, "expert": 8}, 128),
    ("8x22B", {"pipeline": 5, "expert": 8}, 40),  # stages of 12, 11, 11, 11, 11
    ("small", {"tensor": 2, "pipeline": 3, "expert": 2}, 12),
    ("tied", {"pipeline": 2}, 2),
    ("tied", {}, 2),
]


def shape_of(name):
    return {"small": SMALL, "tied": dataclasses.replace(SMALL, tie_word_embeddings=True), **PUBLISHED}[name]


@dataclasses.dataclass
class Allocated:
    weights: int
    gradients: int
    optimizer: int


def _everyone_says_the_same(said, own, group=None):
    said[:] = [own] * len(said)


@pytest.fixture
def allocated(monkeypatch):
    """Build model, gradient buffers and optimizer of the first rank of a stage; the bytes that each takes."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_mixtral.mcore import cpu, ranks
    from megatron_mixtral.model import build as model
    from megatron_mixtral.spec.jobs import FinetuneConfig
    from megatron_mixtral.training import optimizer as optimize

    meta, kind = torch.device("meta"), torch.Tensor.type

    def build(shape, layout, world, stage, precision="bf16", lora=None, fp8_experts=False):
        rank = stage * world // layout.get("pipeline", 1)
        for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            ranks.initialize(Layout(**layout))
            with monkeypatch.context() as patch:
                patch.setattr(cpu, "CPU", meta)  # what torch.cuda.current_device() returns here
                patch.setattr(ranks, "device", lambda: meta)
                patch.setattr(torch.Tensor, "type", lambda tensor: kind(tensor).replace(".meta", ""))
                patch.setattr(dist, "all_gather_object", _everyone_says_the_same)
                if fp8_experts:
                    return _served(shape, Layout(**layout))
                return _bytes(shape, Layout(**layout), precision, lora)
        finally:
            ranks.shutdown()

    def _served(shape, layout):
        built = model.build(shape, layout, precision="bf16", random_weights=False, fp8_experts=True)
        scales = [s for layer in built.decoder.layers for s in layer.mlp.experts.scales]
        return sum(t.nbytes for t in (*built.parameters(), *built.buffers(), *scales))

    def _bytes(shape, layout, precision, lora):
        built = model.build(shape, layout, precision=precision, random_weights=False, aux_loss=0.01, lora=lora)
        assert {p.device.type for p in built.parameters()} == {"meta"}
        weights = sum(t.nbytes for t in (*built.parameters(), *built.buffers()))
        parts = optimize.build(FinetuneConfig(model="", data="", layout=layout, precision=precision), built)
        buffers = [*parts.chunks[0].buffers, *parts.chunks[0].expert_parallel_buffers]
        inner = [part.optimizer for part in parts.optimizer.chained_optimizers]
        state = [t for o in inner for s in o.state.values() for t in s.values() if t.dim()]
        masters = [p for o in inner for g in o.param_groups for p in g["params"]] if precision == "bf16" else []
        return Allocated(
            weights=weights,
            gradients=sum(b.grad_data.nbytes for b in buffers),
            optimizer=sum(t.nbytes for t in (*state, *masters)),
        )

    return build


@pytest.mark.parametrize(("name", "layout", "world"), LAYOUTS)
def test_weights_are_exact_and_gradients_and_optimizer_up_to_padding(allocated, name, layout, world):
    shape, axes = shape_of(name), Layout(**layout)
    work = TrainingWork(sequence_length=64, micro_batch=1, global_batch=axes.data_parallel(world))
    told = memory.training(shape, axes, world, work)
    for stage in {0, axes.pipeline // 2, axes.pipeline - 1}:
        real, parts = allocated(shape, layout, world, stage), told[stage].parts
        assert parts["weights"] == real.weights
        # Buffers are padded: 64 numbers a parameter, 128 and a whole number of ranks at the end.
        padding = 4 * (64 * 20 * shape.num_hidden_layers + 2 * 128 * world)
        assert parts["gradients"] <= real.gradients <= parts["gradients"] + padding
        assert abs(parts["optimizer"] - real.optimizer) <= 3 * padding


@pytest.mark.parametrize(
    ("name", "layout", "world"), [("8x7B", {}, 1), ("8x22B", {"pipeline": 3, "expert": 2}, 6), LAYOUTS[3]]
)
def test_weights_in_fp8_are_exact(allocated, name, layout, world):
    shape, axes = shape_of(name), Layout(**layout)
    work = ServingWork(max_batch=1, max_tokens=64, fp8_experts=True)
    for told in memory.serving(shape, axes, work):
        assert told.parts["weights"] == allocated(shape, layout, world, told.stage, fp8_experts=True)


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    ("layout", "world"), [({"pipeline": 2, "expert": 2}, 4), ({"tensor": 2, "expert": 2, "expert_tensor": 2}, 8)]
)
def test_adapters_alone_have_gradients_and_an_optimizer(allocated, layout, world, experts):
    from megatron_mixtral.weights.lora import Lora

    axes = Layout(**layout)
    work = TrainingWork(
        sequence_length=64, micro_batch=1, global_batch=axes.data_parallel(world), lora=8, lora_experts=experts
    )
    told = memory.training(SMALL, axes, world, work)
    for stage in range(axes.pipeline):
        real = allocated(SMALL, layout, world, stage, lora=Lora(rank=8, alpha=16, experts=experts))
        parts = told[stage].parts
        assert parts["weights"] == real.weights
        padding = 4 * (64 * 12 * SMALL.num_hidden_layers + 2 * 128 * world)
        assert parts["gradients"] <= real.gradients <= parts["gradients"] + padding
        assert abs(parts["optimizer"] - real.optimizer) <= 3 * padding


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_decides_what_a_parameter_takes(allocated, precision):
    work = TrainingWork(sequence_length=64, micro_batch=1, global_batch=1, precision=precision)
    parts = memory.training(SMALL, Layout(), 1, work)[0].parts
    real = allocated(SMALL, {}, 1, 0, precision)
    assert parts["weights"] == real.weights
    assert parts["optimizer"] == pytest.approx(real.optimizer, rel=0.05)
    numbers = parts["weights"] / memory.BYTES[precision]
    held = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    assert held / numbers == {"bf16": 18, "fp32": 16}[precision]


# A step of two real ranks

TRAINED = MixtralShape(
    num_hidden_layers=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    intermediate_size=512,
    hidden_size=256,
    head_dim=32,
    vocab_size=1000,
)


def bytes_after_a_step(expert):
    """Everything that lives on this rank after one step: each tensor's storage once."""
    import gc

    import torch

    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build as model
    from megatron_mixtral.spec.jobs import FinetuneConfig
    from megatron_mixtral.training import optimizer as optimize

    layout = Layout(expert=expert)
    ranks.initialize(layout)
    built = model.build(TRAINED, layout, precision="fp32", aux_loss=0.01)
    parts = optimize.build(FinetuneConfig(model="", data="", layout=layout, precision="fp32"), built)
    chunk = parts.chunks[0]
    optimize.zero_grad(parts)
    ids = torch.randint(TRAINED.vocab_size, (1, 17))
    chunk(ids[:, :-1], torch.arange(16)[None], None, labels=ids[:, 1:].contiguous()).mean().backward()
    chunk.start_grad_sync()
    chunk.finish_grad_sync()
    optimize.set_step(parts, 1)
    assert optimize.step(parts)[0]
    gc.unfreeze()
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    tensors += [p.grad for p in built.parameters() if p.grad is not None]
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
    return sum(storages.values())


@pytest.mark.parametrize("expert", [1, 2])
def test_two_ranks_hold_after_a_step_what_was_told(expert):
    work = TrainingWork(sequence_length=16, micro_batch=1, global_batch=2, precision="fp32")
    parts = memory.training(TRAINED, Layout(expert=expert), 2, work)[0].parts
    told = sum(parts[name] for name in ("weights", "gradients", "optimizer"))
    for real in ranks(2, bytes_after_a_step, expert):
        assert told <= real < 1.02 * told


def test_context_parallelism_is_of_training_alone(allocated):
    from megatron_mixtral.errors import LayoutError

    with pytest.raises(LayoutError, match="context parallel 2"):
        allocated(SMALL, {"context": 2}, 2, 0)
    cut = Layout(context=2)
    work = ServingWork(max_batch=1, max_tokens=64)
    ask = fit.Request(cluster=profile.load("selene"), layout=cut, shape=SMALL, work=work)
    with pytest.raises(launcher_errors.LayoutError, match="--cp: 2"):
        fit.study(ask)


# What the backward pass needs, with real ranks exchanging tokens


def bytes_of_a_layer(axes):
    """What autograd keeps for one more layer of our fused kernels, parameters left out."""
    import torch

    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build as model

    layout = Layout(**axes)
    ranks.initialize(layout)

    def kept(layers):
        shape = dataclasses.replace(
            TRAINED, num_hidden_layers=layers, hidden_size=TRAINED.hidden_size // 4, head_dim=16
        )
        built = model.build(shape, layout, precision="fp32", aux_loss=0.01, fuse=True)
        own = {p.untyped_storage().data_ptr() for p in built.parameters()}
        found = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.randint(TRAINED.vocab_size, (2, 65))
        positions = torch.arange(64).expand(2, -1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            built(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous())
        return sum(found.values())

    told = kept(2) - kept(1)
    ranks.shutdown()
    return told


@pytest.mark.parametrize(
    "axes", [{}, {"tensor": 2}, {"expert": 2}, {"tensor": 2, "expert": 2}, {"tensor": 2, "expert_tensor": 2}]
)
def test_ranks_that_exchange_tokens_keep_what_was_told(axes):
    pytest.importorskip("triton", reason="our kernels run on CPU in Triton's interpreter")
    world = max(axes.values(), default=1)
    work = TrainingWork(
        sequence_length=64, micro_batch=2, global_batch=2 * Layout(**axes).data_parallel(world), precision="fp32"
    )
    shape = dataclasses.replace(TRAINED, num_hidden_layers=1, hidden_size=TRAINED.hidden_size // 4, head_dim=16)
    [told] = memory.training(shape, Layout(**axes), world, work)
    real = ranks(world, bytes_of_a_layer, axes, env={"TRITON_INTERPRET": "1"})
    # Experts get unequal shares; together the ranks hold what all were told, and some change for norms and routers.
    assert sum(real) / world == pytest.approx(told.parts["activations"], rel=0.05)
