"""Stages that work on several chunks of layers in turn train what whole stages do, and go on from one another."""

import shutil

import pytest
from finetunes import PLAIN, losses, of_kind
from small_world import make_world, tensors_of
from spawn_ranks import ranks

STAGES = {"layout": {"pipeline": 2}}
CHUNKS = {**STAGES, "virtual_pipeline": 2}
RUNS = [  # name, whose copy it goes on from, what is changed
    ("plain", "", STAGES),
    ("interleaved", "", CHUNKS),
    ("stopped", "", {**CHUNKS, "steps": 2}),
    ("again", "stopped", CHUNKS),
    ("in_stages", "stopped", STAGES),
    ("in_experts", "stopped", {"layout": {"expert": 2}}),
    ("from_stages", "stopped_plain", CHUNKS),
    ("adapters", "", {**STAGES, "lora": 4}),
    ("interleaved_adapters", "", {**CHUNKS, "lora": 4}),
    ("uneven", "", {**CHUNKS, "virtual_pipeline": 3}),
    ("short", "", {**CHUNKS, "global_batch": 6}),
    ("alone", "", {"virtual_pipeline": 2, "layout": {"expert": 2}}),
    ("own_lengths", "", {**CHUNKS, "first_stage_layers": 1}),
]


def train_all(raw, folder):
    """Each run's events or refusal, in one set of processes; and the most chunks that waited for their backward."""
    import os
    from pathlib import Path

    from megatron_mixtral.distributed import collectives
    from megatron_mixtral.errors import JobError
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.observability import events
    from megatron_mixtral.training import loop

    from megatron.core.pipeline_parallel import schedules

    waiting, most, told = [0], {}, {}
    forward, backward = loop._forward, schedules.backward_step

    def counted(iterator, chunk):
        waiting[0] += chunk.training
        most[name] = max(most.get(name, 0), waiting[0])
        return forward(iterator, chunk)

    def counted_back(*args, **kwargs):
        waiting[0] -= 1
        return backward(*args, **kwargs)

    loop._forward, schedules.backward_step = counted, counted_back
    ranks.shutdown = lambda: None
    for name, source, change in RUNS:
        run_dir = Path(folder) / name
        if source == "stopped_plain":
            _run(loop, raw | STAGES | {"steps": 2}, Path(folder) / source)
        if source:
            collectives.on_first_rank(lambda: shutil.copytree(Path(folder) / source, run_dir))  # noqa: B023
        try:
            _run(loop, raw | change, run_dir)
            told[name] = events.read(run_dir / "events.jsonl") if os.environ["RANK"] == "0" else []
        except JobError as error:
            told[name] = f"{error.exit_code}: {error}"
    return told, most


def _run(loop, raw, run_dir):
    from megatron_mixtral.spec import checks, jobs

    run_dir.mkdir(exist_ok=True)
    loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), run_dir)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(events or refusals by run, most chunks under way by rank and run, the runs' folder)."""
    folder = tmp_path_factory.mktemp("interleaving")
    world = tmp_path_factory.mktemp("deep")
    make_world(world, num_hidden_layers=4)
    constant = {"steps": 4, "min_lr": PLAIN["lr"], "save_interval": 2, "eval_steps": 2, "validation": 0.2}
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), **constant}
    results = ranks(2, train_all, raw, str(folder))
    return results[0][0], [most for _, most in results], folder


def test_chunks_in_turn_learn_what_whole_stages_do(trained):
    told, _, _ = trained
    for kind, field in (("step", "loss"), ("step", "aux_loss"), ("step", "grad_norm"), ("eval", "loss")):
        assert of_kind(told["interleaved"], kind, field) == pytest.approx(
            of_kind(told["plain"], kind, field), abs=1e-5
        )
    for field in ("expert_load", "expert_load_worst", "tokens_dropped"):
        assert of_kind(told["interleaved"], "step", field) == of_kind(told["plain"], "step", field)
    assert losses(told["plain"])[-1] < losses(told["plain"])[0] - 0.3, "it learns nothing, so it can tell nothing"


def tensors(folder, name):
    return tensors_of(folder / name / "checkpoints" / "iter_0000004")


def test_a_run_goes_on_bit_for_bit_and_at_any_other_layout(trained):
    told, _, folder = trained
    whole = tensors(folder, "interleaved")
    assert losses(told["again"])[2:] == losses(told["interleaved"])[2:]
    assert all((value == whole[key]).all() for key, value in tensors(folder, "again").items())
    for name in ("in_stages", "in_experts", "from_stages"):
        assert losses(told[name])[-2:] == pytest.approx(losses(told["plain"])[2:], abs=1e-5), name


def test_it_exports_what_whole_stages_export(trained):
    from safetensors.torch import load_file

    from megatron_mixtral.jobs import convert
    from megatron_mixtral.spec.jobs import ConvertConfig

    _, _, folder = trained
    exported = {}
    for name in ("plain", "interleaved"):
        out = folder / f"{name}-hub"
        convert.run(ConvertConfig(source=str(folder / name), output=str(out), to="hf"), folder / name)
        exported[name] = load_file(next(out.glob("*.safetensors")))
    assert exported["plain"].keys() == exported["interleaved"].keys()
    assert "model.layers.3.self_attn.q_proj.weight" in exported["plain"]
    for key, value in exported["plain"].items():
        assert (value - exported["interleaved"][key]).abs().max() < 1e-4, key


def test_adapters_of_chunks_learn_the_same(trained):
    told, _, _ = trained
    assert losses(told["interleaved_adapters"]) == pytest.approx(losses(told["adapters"]), abs=1e-5)
    assert losses(told["adapters"]) != losses(told["plain"])


def test_as_many_chunks_wait_as_the_launcher_reckons_with(trained):
    from launcher.planning import memory
    from megatron_mixtral.spec.layout import Layout

    _, most, _ = trained
    for rank, counted in enumerate(most):
        for name, chunks in (("plain", 1), ("interleaved", 2)):
            assert counted[name] == memory.in_flight(Layout(pipeline=2), 4, chunks, rank), (rank, name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("uneven", "virtual_pipeline: 4 layers / (PP 2 x 3 chunks) = 0.667, not whole"),
        ("short", "x 3 micro batches, and 3 / PP 2 = 1.5, not whole"),
        ("alone", "virtual_pipeline: 2, but PP 1 has nothing to interleave"),
        ("own_lengths", "virtual_pipeline: its chunks have equal lengths"),
    ],
)
def test_what_does_not_divide_is_refused_with_its_equation(trained, name, words):
    told, _, _ = trained
    assert told[name].startswith("2: ")
    assert words in told[name]
