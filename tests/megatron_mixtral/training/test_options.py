"""Every option of training does what it says, measured by what a run tells of itself."""

import math

import pytest
from finetunes import PLAIN, finetuned, finetuned_together, losses, of_kind
from small_world import tensors_of
from spawn_ranks import ranks


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory):
    """What runs of one process tell, by what was changed in them."""
    folder = tmp_path_factory.mktemp("alone")
    variants = {
        "plain": {},
        "full": {"recompute": "full"},
        "selective": {"recompute": "selective"},
        "capacity": {"capacity_factor": 0.5},
        "padded": {"capacity_factor": 0.5, "pad_to_capacity": True},
        "by_position": {"capacity_factor": 0.5, "drop_policy": "position"},
        "roomy": {"capacity_factor": 4.0},
        "z_loss": {"z_loss": 0.1},
        "router_fp32": {"router_fp32": True},
        "frozen": {"freeze_router": True},
        "board": {"tensorboard": True},
        "spike": {"spike": 0.5, "steps": 30, "max_skipped": 100},
        "late": {"warmup_steps": 7},
    }
    raw = {**PLAIN, "model": str(world), "data": str(world / "data")}
    return ranks(1, finetuned, raw, variants, str(folder))[0], folder


@pytest.mark.parametrize("name", ["full", "selective", "router_fp32", "roomy"])
def test_what_only_costs_or_saves_memory_changes_no_loss(alone, name):
    told, _ = alone
    assert losses(told[name]) == pytest.approx(losses(told["plain"]), abs=1e-5)
    assert of_kind(told[name], "step", "expert_load") == of_kind(told["plain"], "step", "expert_load")


def test_a_capacity_drops_tokens_and_tells_how_many(alone):
    told, _ = alone
    assert all(share > 0.2 for share in of_kind(told["capacity"], "step", "tokens_dropped"))
    assert losses(told["capacity"]) != losses(told["plain"])
    assert losses(told["padded"]) == pytest.approx(losses(told["capacity"]), abs=1e-4)
    assert losses(told["by_position"]) != losses(told["capacity"])
    for name in ("padded", "by_position"):  # how many are dropped follows from where they want to go
        assert (
            of_kind(told[name], "step", "tokens_dropped")[0]
            == of_kind(told["capacity"], "step", "tokens_dropped")[0]
        )
    assert of_kind(told["plain"], "step", "tokens_dropped") == [0.0] * 3
    assert of_kind(told["roomy"], "step", "tokens_dropped") == [0.0] * 3


def counted(folder):
    """For each way to drop: what the meter counts, and what follows from the router's own logits."""
    from pathlib import Path

    import torch

    from megatron_mixtral.checkpoint import save_load
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.model import build
    from megatron_mixtral.spec.layout import Layout
    from megatron_mixtral.spec.shape import MixtralShape
    from megatron_mixtral.training import meters

    from megatron.core.transformer.moe.router import TopKRouter

    folder, found = Path(folder) / "release", []
    ranks.initialize(Layout())
    shape = MixtralShape.from_folder(folder)
    for factor, padded, policy in (
        (0.6, False, "probs"),
        (0.6, True, "probs"),
        (0.6, True, "position"),
        (2.0, True, "probs"),
    ):
        options = {"moe_expert_capacity_factor": factor, "moe_pad_expert_input_to_capacity": padded}
        built = build.build(shape, Layout(), precision="fp32", **options, moe_token_drop_policy=policy)
        save_load.load_weights(built, folder)
        meter, wanted = meters.ExpertLoad([built], shape), []

        def count(router, given, _, factor=factor, wanted=wanted):
            tokens = given[0].flatten(0, 1)
            chosen = (tokens @ router.weight.t()).topk(2).indices
            capacity = -(-len(tokens) * 2 * factor // 4)
            wanted.extend(min(int((chosen == expert).sum()), capacity) for expert in range(4))

        for router in (m for m in built.modules() if isinstance(m, TopKRouter)):
            router.register_forward_hook(count)
        ids = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
        built(ids, torch.arange(32).expand(2, -1), None)
        found.append((meter.take(), wanted))
    ranks.shutdown()
    return found


def test_tokens_kept_are_counted_as_the_router_s_logits_say(world):
    for told, wanted in ranks(1, counted, str(world))[0]:
        assert told == wanted
        assert 0 < sum(wanted) <= 2 * 64 * 2
    assert sum(wanted) == 2 * 64 * 2, "nothing is dropped where there is room for all"


def test_the_z_loss_pulls_on_the_router(alone):
    told, _ = alone
    assert of_kind(told["z_loss"], "step", "grad_norm")[0] != pytest.approx(
        of_kind(told["plain"], "step", "grad_norm")[0], rel=1e-4
    )
    assert losses(told["z_loss"])[0] == losses(told["plain"])[0]


def router_of(folder):
    (name,) = (n for n in tensors_of(folder) if n == "decoder.layers.mlp.router.weight")
    return tensors_of(folder)[name]


def test_a_frozen_router_stays_as_it_was(alone, world):
    _, folder = alone
    before = router_of(world / "release")
    last = "checkpoints/iter_0000003"
    assert (router_of(folder / "frozen" / last) == before).all()
    assert (router_of(folder / "plain" / last) != before).any()


def test_tensorboard_has_the_numbers_of_the_events(alone):
    board = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    told, folder = alone
    read = board.EventAccumulator(str(folder / "board" / "tensorboard")).Reload()
    assert [s.step for s in read.Scalars("loss")] == [1, 2, 3]
    assert [s.value for s in read.Scalars("loss")] == pytest.approx(losses(told["board"]), rel=1e-6)
    assert "expert_load" in read.Tags()["scalars"]


def test_updates_that_are_spikes_are_skipped_and_counted(alone):
    """At a factor of a half nearly every norm is one, once there are enough to have a usual one."""
    told, _ = alone
    skipped = of_kind(told["spike"], "step", "skipped")
    assert skipped[15] == 0
    assert 3 <= skipped[-1] <= 14


def test_a_warm_up_longer_than_the_run_is_cut(alone):
    told, _ = alone
    assert of_kind(told["late"], "step", "lr")[:2] == pytest.approx([0.005, 0.01])


def test_a_step_tells_all_its_numbers(alone):
    told, _ = alone
    step = next(e for e in told["plain"] if e["event"] == "step")
    names = "loss aux_loss lr grad_norm tokens_per_s tflops_per_gpu memory_gib expert_load data_wait tokens_dropped"
    for name in names.split():
        assert math.isfinite(step[name]), name
    assert 1 <= step["expert_load"] <= step["expert_load_worst"] <= 4
    # 64 = 2 layers x (attention 2 x 32 x 8 x 6 + 2 experts x 3 x 32 x 48 + router 32 x 4 + scores) + 64 x 32
    per_token = 6 * (2 * (2 * 32 * 8 * 6 + 2 * 3 * 32 * 48 + 32 * 4) + 64 * 32 + 2 * 4 * 8 * 32)
    assert step["tflops_per_gpu"] == pytest.approx(per_token * 256 / step["seconds"] / 1e12, abs=1e-4)


def test_the_ways_of_overlapping_change_nothing(world, tmp_path):
    """Two replicas whose experts are apart, with gradients and parameters under way or waited for."""
    variants = {
        "overlapped": {"eval_steps": 2, "eval_interval": 1, "validation": 0.2},
        "waited": {
            "overlap_grad_reduce": False,
            "overlap_param_gather": False,
            "eval_steps": 2,
            "eval_interval": 1,
        },
    }
    variants["waited"]["validation"] = 0.2
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), "layout": {"expert": 2}}
    told = ranks(2, finetuned_together, raw, variants, str(tmp_path))[0]
    assert losses(told["overlapped"]) == losses(told["waited"])
    assert of_kind(told["overlapped"], "eval", "loss") == of_kind(told["waited"], "eval", "loss")


def test_gradients_have_one_norm_however_tensors_are_cut(world, tmp_path):
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), "steps": 2}
    variants = {"whole": {}, "cut": {"layout": {"tensor": 2}}}
    told = ranks(2, finetuned_together, raw, variants, str(tmp_path))[0]
    for field in ("grad_norm", "loss"):
        assert of_kind(told["cut"], "step", field) == pytest.approx(of_kind(told["whole"], "step", field), abs=1e-5)


def test_stages_of_uneven_length_change_nothing(world, tmp_path):
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), "layout": {"pipeline": 2}}
    variants = {"even": {}, "uneven": {"first_stage_layers": 1}, "wrong": {"first_stage_layers": 2}}
    variants |= {"fp8": {"fp8": "hybrid", "precision": "bf16"}}
    variants |= {"full": {"capacity_factor": 2.5, "pad_to_capacity": True}}
    told = ranks(2, finetuned_together, raw, variants, str(tmp_path))[0]
    assert losses(told["uneven"]) == losses(told["even"])
    assert "with pad_to_capacity at most 4 experts / 2 a token = 2" in told["full"]
    assert told["fp8"] == "fp8: needs Transformer Engine, which isn't installed where the job runs"
    said = "first_stage_layers 2, last_stage_layers 0: 2 layers leave 0 for 1 other stages of PP 2"
    assert told["wrong"] == f"{said}: not the same whole number, at least 1, for each"


def spoil_one_replica(raw, folder):
    """Two replicas of everything; one number of the second one changes by the smallest bit there is."""
    from pathlib import Path

    import torch

    from megatron_mixtral.errors import JobError
    from megatron_mixtral.mcore import ranks
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    step = loop.Trainer._step

    def step_and_spoil(self):
        outcome = step(self)
        if self.rank == 1 and outcome.step == 2:
            weight = dict(self.parts.chunks[0].module.named_parameters())["decoder.layers.0.mlp.router.weight"]
            with torch.no_grad():
                weight.view(torch.int32)[0, 0] ^= 1
        return outcome

    loop.Trainer._step = step_and_spoil
    ranks.shutdown = lambda: None
    try:
        loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), Path(folder))
    except JobError as error:
        return error.exit_code, str(error)
    return 0, ""


def test_replicas_that_differ_by_one_bit_are_found(world, tmp_path):
    more = {"replica_check_interval": 1, "overlap_param_gather": False}
    raw = {**PLAIN, "model": str(world), "data": str(world / "data"), **more}
    for code, words in ranks(2, spoil_one_replica, raw, str(tmp_path)):
        assert code == 1
        assert "step 2: parameter decoder.layers.0.mlp.router.weight differs between ranks 0 and 1" in words
