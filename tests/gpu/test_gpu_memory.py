"""The launcher's memory formula against what a GPU really holds at the worst moment of a step: within a tenth.

Each measurement is a process of its own: megatron-core's hooks keep what one has built until it ends.
"""

import dataclasses
import gc
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from launcher.planning import memory
from launcher.planning.memory import ServingWork, TrainingWork
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import PUBLISHED, MixtralShape

GIB = 2**30
TWO_LAYERS = dataclasses.replace(PUBLISHED["8x7B"], num_hidden_layers=2)
ONE_LAYER = dataclasses.replace(PUBLISHED["8x22B"], num_hidden_layers=1)
DEEP = MixtralShape(  # most of what it holds are activations
    num_hidden_layers=12,
    num_local_experts=8,
    num_experts_per_tok=2,
    num_attention_heads=16,
    num_key_value_heads=4,
    intermediate_size=4096,
    hidden_size=2048,
    head_dim=128,
    vocab_size=32000,
)
CASES = {  # model, micro batch, sequence
    "two layers of 8x7B": (TWO_LAYERS, 2, 4096),
    "one layer of 8x22B": (ONE_LAYER, 1, 4096),
    "deep": (DEEP, 4, 4096),
    "long": (dataclasses.replace(DEEP, num_hidden_layers=4), 1, 32768),
}
RECOMPUTED = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture
def measure():
    """Call a function of this module with these arguments in a process that has the GPU to itself."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")

    def apart(function, *args):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as one:
            return one.submit(function, *args).result()

    return apart


def step_bytes(shape, rows, sequence, config, dispatch):
    """Two steps of two micro batches: (peak, what stands between steps)."""
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build, fused
    from megatron_mixtral.spec.jobs import FinetuneConfig
    from megatron_mixtral.training import optimizer

    from megatron.core.transformer.moe.moe_layer import MoELayer

    ranks.initialize(Layout())
    if dispatch:
        fused.MoE.forward = MoELayer.forward
    before = torch.cuda.memory_allocated()
    built = build.build(shape, Layout(), precision="bf16", max_sequence_length=sequence, **config)
    parts = optimizer.build(FinetuneConfig(model="", data=""), built)
    chunk = parts.chunks[0]
    torch.manual_seed(1)
    torch.cuda.reset_peak_memory_stats()
    for number in (1, 2):
        optimizer.zero_grad(parts)
        optimizer.set_step(parts, number)
        for _ in range(2):
            ids = torch.randint(shape.vocab_size, (rows, sequence + 1), device="cuda")
            positions = torch.arange(sequence, device="cuda").expand(rows, -1)
            with chunk.no_sync():
                chunk(ids[:, :-1], positions, None, labels=ids[:, 1:].contiguous()).float().mean().backward()
        chunk.start_grad_sync()
        chunk.finish_grad_sync()
        assert optimizer.step(parts)[0]
    gc.collect()
    return torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def compare(measure, case, recompute="none", config=(), *, dispatch=False):
    shape, rows, sequence = CASES[case]
    work = TrainingWork(sequence_length=sequence, micro_batch=rows, global_batch=2 * rows, recompute=recompute)
    [told] = memory.training(shape, Layout(), 1, work)
    peak, standing = measure(step_bytes, shape, rows, sequence, dict(config), dispatch)
    lasting = sum(told.parts[name] for name in ("weights", "gradients", "optimizer"))
    print(f"\n  peak {peak / GIB:.2f} GiB, told {told.total / GIB:.2f} ({told.total / peak - 1:+.1%})")
    print(f"  between steps {standing / GIB:.2f}, told {lasting / GIB:.2f}")
    print(f"  in passing {(peak - standing) / GIB:.2f}, told {(told.total - lasting) / GIB:.2f}")
    assert standing == pytest.approx(lasting, rel=0.02)
    assert peak == pytest.approx(told.total, rel=0.1)


@pytest.mark.parametrize("case", CASES)
def test_a_step_holds_what_was_told(measure, case):
    compare(measure, case)


@pytest.mark.parametrize("case", ["deep", "long"])
def test_recomputing_whole_layers(measure, case):
    compare(measure, case, "full", RECOMPUTED)


def test_the_way_through_the_dispatcher(measure):
    """What ranks of an expert-parallel group do, here with nobody to exchange with."""
    compare(measure, "deep", dispatch=True)


def server_bytes(shape, work):
    """A server that reads a prompt for each request it can hold."""
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.serve.engine.replica import Replica, Sizes
    from megatron_mixtral.serve.messages import Request

    ranks.initialize(Layout())
    before = torch.cuda.memory_allocated()
    options = {"random_weights": not work.fp8_experts, "fp8_experts": work.fp8_experts}
    built = build.build(shape, Layout(), precision="bf16", **options)
    for parameter in built.parameters() if work.fp8_experts else ():
        parameter.data.zero_()
    made = Replica(built, Sizes(requests=work.max_batch, context_tokens=work.max_tokens))
    for number in range(work.max_batch):
        made.add(Request(id=number, prompt=[7] * 300, max_tokens=4, seed=0, temperature=0.0))
    while made.busy:
        made.step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("fp8_experts", [False, True])
def test_a_server_holds_its_weights_and_the_cache(measure, fp8_experts):
    work = ServingWork(max_batch=16, max_tokens=2048, fp8_experts=fp8_experts)
    [told] = memory.serving(DEEP, Layout(), work)
    peak = measure(server_bytes, DEEP, work)
    print(f"\n  peak {peak / GIB:.2f} GiB, told {told.total / GIB:.2f} ({told.total / peak - 1:+.1%})")
    assert peak == pytest.approx(told.total, rel=0.1)
