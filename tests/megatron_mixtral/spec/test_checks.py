"""Settings of training that contradict each other, or the layout, are refused with their numbers at once."""

import pytest

from launcher.cluster import profile
from launcher.errors import LayoutError, UsageError
from launcher.planning import jobs, memory, suggest
from launcher.planning.layout import SHAPES, Layout
from launcher.sandbox import rehearsal_plan

SELENE = profile.load("selene")


def planned(axes=None, **values):
    return jobs.plan_finetune(SELENE, axes=jobs.Axes(**axes or {}), ask=jobs.Ask(nodes=4), values=values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad_to_capacity": True}, "--pad-to-capacity: experts have no capacity unless --capacity-factor gives"),
        ({"drop_policy": "position"}, "--drop-policy: experts have no capacity"),
        ({"capacity_factor": 5, "pad_to_capacity": True}, "at most 8 experts / 2 a token = 4"),
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe: goes with --fp8 alone"),
        ({"fp8": "hybrid", "precision": "fp32"}, "--fp8: goes with --precision bf16, not fp32"),
        ({"fp8": "e4m3", "lora": 8}, "leave out --lora"),
        ({"fp8": "e5m2"}, "--fp8: 'e5m2' isn't one of none, hybrid, e4m3"),
        ({"virtual_pipeline": 0}, "--virtual-pipeline: 0 must be at least 1"),
        ({"lr": 1e-6}, "--lr: 1e-06 is below --min-lr, 1e-05"),
        ({"min_lr": 2e-4}, "--lr: 0.0001 is below --min-lr, 0.0002"),
        ({"lr": "inf"}, "--lr: 'inf' isn't a number"),
        ({"seed": 2**32}, "--seed: 4294967296 must be between 0 and"),
    ],
)
def test_settings_that_say_nothing_without_another_are_refused(values, words):
    with pytest.raises(UsageError) as caught:
        planned(**values)
    assert words in str(caught.value)


@pytest.mark.parametrize("packing", ["documents", "none"])
def test_context_parallelism_goes_with_whole_sequences_alone(packing):
    with pytest.raises(UsageError, match=f"--packing: {packing}, but --cp 2 splits whole sequences; use stream"):
        planned({"context": 2}, packing=packing)
    assert planned({"context": 2}, packing="stream").config["packing"] == "stream"


def test_settings_that_belong_together_are_handed_on():
    asked = {"capacity_factor": 4.0, "pad_to_capacity": True, "drop_policy": "position", "fp8": "hybrid"}
    assert asked.items() <= planned(**asked, fp8_recipe="blockwise", virtual_pipeline=2).config.items()


@pytest.mark.parametrize(
    ("axes", "values", "words", "instead"),
    [
        ({}, {"virtual_pipeline": 3}, "32 layers / (PP 4 x 3 chunks) = 2.67, not whole", "--virtual-pipeline 2"),
        ({"pipeline": 1}, {"virtual_pipeline": 2}, "PP 1 has nothing to interleave", "--pp 2"),
        (
            {},
            {"virtual_pipeline": 2, "global_batch": 240},
            "240 = micro batch 1 x DP 8 x 30 micro batches, and 30 / PP 4 = 7.5, not whole",
            "--global-batch 256",
        ),
        ({}, {"virtual_pipeline": 2, "first_stage_layers": 5}, "its chunks are of one length", ""),
    ],
)
def test_chunks_that_do_not_come_out_are_refused_with_what_would(axes, values, words, instead):
    with pytest.raises(LayoutError) as caught:
        planned(axes, **values)
    assert words in str(caught.value)
    assert isinstance(caught.value, suggest.Refused)
    if instead:
        assert instead in [s.options for s in caught.value.suggestions]


def test_interleaving_makes_the_bubble_smaller_and_holds_more():
    plain, chunks = planned().outlook, planned(virtual_pipeline=4).outlook
    assert plain.bubble == pytest.approx(3 / 35)
    assert chunks.bubble == pytest.approx(3 / (4 * 32 + 3))
    first, most = plain.usage[0].parts, chunks.usage[0].parts
    # 4 micro batches of 8 layers; 2 x 3 + 3 x 4 + 1 = 19 chunks of 2, and what each of them hands on.
    layer = first["activations"] / 32
    assert most["activations"] == 38 * layer + 19 * 4096 * 2 * 4096
    assert most["weights"] == first["weights"]
    few = memory.Training(sequence=64, micro_batch=1, micro_batches=4, virtual_pipeline=2)
    assert [memory.in_flight(Layout(pipeline=4), few, stage) for stage in range(4)] == [8, 8, 7, 5]
    assert SHAPES["8x7B"].layers % (4 * 4) == 0


def test_a_rehearsal_has_layers_and_micro_batches_for_every_chunk(tmp_path):
    plan = planned(virtual_pipeline=2, fp8="hybrid", wandb_project="p")
    places = {name: tmp_path / name for name in ("folder", "slurm_conf", "model", "data")}
    changed = rehearsal_plan.rehearsed(plan, python="p", **places)
    assert (changed.config["virtual_pipeline"], changed.config["global_batch"]) == (2, 8 * 4)
    assert not changed.config.keys() & set(rehearsal_plan.ONLY_THERE)
    assert rehearsal_plan.tiny(changed.layout, changed.config).layers == 8
    uneven = planned(first_stage_layers=7, last_stage_layers=7)
    assert rehearsal_plan.tiny(uneven.layout, uneven.config).layers == 7 + 1 + 1 + 7
