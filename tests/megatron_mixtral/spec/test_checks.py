"""What can't be is refused at once, with its numbers: by the launcher in options, by the job in keys."""

import pytest
import yaml

from launcher.cluster import profile
from launcher.errors import LayoutError, UsageError
from launcher.planning import jobs, memory, suggest
from launcher.sandbox import rehearsal_plan
from megatron_mixtral import errors
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import FinetuneConfig, ServeConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import PUBLISHED

SELENE = profile.load("selene")


def planned(axes=None, **values):
    return jobs.plan_finetune(SELENE, axes=jobs.Axes(**axes or {}), ask=jobs.Ask(nodes=4), values=values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"pad_to_capacity": True}, "--pad-to-capacity: has an effect only with --capacity-factor"),
        ({"drop_policy": "position"}, "--drop-policy: has an effect only with"),
        ({"capacity_factor": 5, "pad_to_capacity": True}, "at most 8 experts / 2 a token = 4"),
        ({"fp8_recipe": "mxfp8"}, "--fp8-recipe: has an effect only with --fp8"),
        ({"fp8": "hybrid", "precision": "fp32"}, "--fp8: needs --precision bf16, not fp32"),
        ({"fp8": "e4m3", "lora": 8}, "remove --lora"),
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
        ({}, {"virtual_pipeline": 2, "first_stage_layers": 5}, "its chunks have equal lengths", ""),
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
    assert [memory.in_flight(Layout(pipeline=4), 4, 2, stage) for stage in range(4)] == [8, 8, 7, 5]
    assert PUBLISHED["8x7B"].num_hidden_layers % (4 * 4) == 0


def test_a_rehearsal_has_layers_and_micro_batches_for_every_chunk(tmp_path):
    plan = planned(virtual_pipeline=2, fp8="hybrid", wandb_project="p")
    places = {name: tmp_path / name for name in ("folder", "slurm_conf", "model", "data")}
    changed = rehearsal_plan.rehearsed(plan, python="p", **places)
    assert (changed.config["virtual_pipeline"], changed.config["global_batch"]) == (2, 8 * 4)
    assert not changed.config.keys() & set(rehearsal_plan.ONLY_THERE)
    assert rehearsal_plan.tiny(changed.layout, changed.config).layers == 8
    uneven = planned(first_stage_layers=7, last_stage_layers=7)
    assert rehearsal_plan.tiny(uneven.layout, uneven.config).layers == 7 + 1 + 1 + 7


# The same by hand


def by_hand(kind=FinetuneConfig, **keys):
    return checks.parse(
        kind, {"model": "m", **({"data": "d"} if kind is FinetuneConfig else {}), **keys}, where="x"
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"steps": 0}, "steps: 0 must be at least 1"),
        ({"lr": -0.1}, "lr: -0.1 must be at least 0"),
        ({"lr": float("nan")}, "lr: nan isn't a number"),
        ({"clip_grad": float("inf")}, "clip_grad: inf isn't a number"),
        ({"validation": 1.1}, "validation: 1.1 must be between 0 and 1"),
        ({"seed": 2**32}, "seed: 4294967296 must be between 0 and 2147483647"),
        ({"steps": 2**63}, "steps: 9223372036854775808 isn't a whole number"),
        ({"steps": 1.5}, "steps: 1.5 isn't a whole number"),
        ({"steps": True}, "steps: True isn't a whole number"),
        ({"tensorboard": "yes"}, "tensorboard: 'yes' isn't true or false"),
        ({"data": 5}, "data: 5 isn't text or a list"),
        ({"precision": "fp8"}, "precision: 'fp8' isn't one of bf16, fp32"),
        ({"layout": {"tensor": 0}}, "layout: tensor: 0 must be at least 1"),
        (
            {"layout": {"tenser": 1}},
            "layout: there is no setting 'tenser'; did you mean tensor? Valid: tensor",
        ),
        ({"layout": 4}, "layout: expected a mapping, got int"),
        ({"step": 3}, "there is no setting 'step'; did you mean steps? Valid: model, data, layout, steps"),
        ({"lr": 1e-6}, "lr: 1e-06 is below min_lr, 1e-05, where it ends"),
        (
            {"pad_to_capacity": True},
            "pad_to_capacity: has an effect only with capacity_factor",
        ),
        ({"fp8_recipe": "mxfp8"}, "fp8_recipe: has an effect only with fp8"),
        ({"lora_experts": True}, "lora_experts: has an effect only with lora RANK"),
        ({"lora_alpha": 8.0}, "lora_alpha: has an effect only with lora RANK"),
        ({"lora": -1}, "lora: -1 must be at least 0"),
        ({"lora": 4, "lora_alpha": float("nan")}, "lora_alpha: nan isn't a number"),
        ({"lora": 4, "lora_dropout": 1.0}, "lora_dropout: must be below 1"),
        (
            {"lora": 4, "lora_dropout": 0.1, "lora_experts": True},
            "lora_dropout: adapters of experts have no dropout",
        ),
        ({"layout": {"context": 2}, "packing": "none"}, "packing: none, but context 2 splits whole sequences"),
        (
            {"layout": {"context": 2}, "sequence_length": 30},
            "sequence_length: 30 / (TP 1 x 2 x CP 2) = 7.5 isn't whole",
        ),
        ({"virtual_pipeline": 2}, "virtual_pipeline: 2, but PP 1 has nothing to interleave; use 1"),
    ],
)
def test_a_configuration_by_hand_is_held_to_the_same(keys, words):
    with pytest.raises(errors.InputError) as caught:
        by_hand(**keys)
    assert str(caught.value).startswith(f"x: {words}")
    assert caught.value.exit_code == 2


def test_what_lacks_a_key_or_is_no_mapping_is_named():
    for raw, words in (({"model": "m"}, "x: data missing"), ([1], "x: expected a mapping, got list")):
        with pytest.raises(errors.InputError, match=words):
            checks.parse(FinetuneConfig, raw, where="x")


def test_a_server_splits_no_sequence():
    with pytest.raises(errors.LayoutError, match="x: context: 2, but an answer is generated token by token: use 1"):
        by_hand(ServeConfig, layout={"context": 2})


def test_defaults_that_are_written_down_contradict_nothing():
    defaults = {"fp8_recipe": "delayed", "drop_policy": "probs", "lora_alpha": 0, "pad_to_capacity": False}
    assert by_hand(**defaults) == by_hand()


def test_numbers_may_be_written_as_yaml_reads_them():
    assert by_hand(**yaml.safe_load("{lr: 1e-4, steps: 5, weight_decay: 1}")).lr == 1e-4


def test_a_step_that_does_not_divide_is_an_equation():
    def config(batch, micro, **more):
        return FinetuneConfig(model="", data="", global_batch=batch, micro_batch=micro, **more)

    assert checks.micro_batches(Layout(), config(16, 2), 4) == 2
    with pytest.raises(errors.LayoutError, match=r"global_batch: 10 = micro batch 1 x DP 4 x 2\.5 accum"):
        checks.micro_batches(Layout(), config(10, 1), 4)


def test_weights_of_a_blend_are_written_behind_the_prefixes():
    assert checks.blend("/a:0.5") == [("/a:0.5", None)]  # one alone is a path, whatever is in it
    assert checks.blend(["/a:0.5", "/b:2"]) == [("/a", 0.5), ("/b", 2.0)]
    assert checks.blend(["/a", "/b:c"]) == [("/a", None), ("/b:c", None)]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["/a:1", "/b"], "data: /a:1, /b: give a weight to each data set"),
        (["/a:0", "/b:1"], "above 0"),
        (["/a:nan", "/b:1"], "above 0"),
        (["/a:1", "/a:2"], "data: /a is there twice"),
        ([], "no"),
    ],
)
def test_wrong_weights_are_named(data, said):
    with pytest.raises(errors.InputError, match=said):
        checks.blend(data)
