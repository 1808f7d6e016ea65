"""Planning: what fits, what doesn't and what is near, for the clusters and the mistakes that people have."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from launcher.cluster import profile
from launcher.errors import LayoutError
from launcher.planning import describe, fit, jobs, memory, suggest
from launcher.planning.fit import Request
from launcher.planning.memory import GIB, ServingWork, TrainingWork
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import PUBLISHED, MixtralShape

DEEP = MixtralShape(
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
MEASURED = [  # on one H100, 2026-11-24, by tests/gpu/test_gpu_memory.py; the first on an H200 too
    (dataclasses.replace(PUBLISHED["8x7B"], num_hidden_layers=2), 2, 4096, "none", 56.86),
    (dataclasses.replace(PUBLISHED["8x22B"], num_hidden_layers=1), 1, 4096, "none", 50.45),
    (DEEP, 4, 4096, "none", 58.58),
    (DEEP, 4, 4096, "full", 47.10),
    (dataclasses.replace(DEEP, num_hidden_layers=4), 1, 32768, "none", 27.26),
    (dataclasses.replace(DEEP, num_hidden_layers=4), 1, 32768, "full", 19.94),
]


@pytest.mark.parametrize(("shape", "rows", "sequence", "recompute", "gib"), MEASURED)
def test_the_formula_tells_what_a_gpu_held(shape, rows, sequence, recompute, gib):
    work = TrainingWork(sequence_length=sequence, micro_batch=rows, global_batch=2 * rows, recompute=recompute)
    [told] = memory.training(shape, Layout(), 1, work)
    assert told.total / GIB == pytest.approx(gib, rel=0.02)


def test_a_server_holds_what_a_gpu_held():
    [told] = memory.serving(DEEP, Layout(), ServingWork(max_batch=16, max_tokens=2048))
    assert told.total / GIB == pytest.approx(5.93, rel=0.02)


def test_the_first_stage_holds_as_many_micro_batches_as_there_are_stages():
    work = TrainingWork(sequence_length=4096, micro_batch=1, global_batch=256)
    first, *_, last = memory.training(PUBLISHED["8x7B"], Layout(pipeline=4, expert=8), 32, work)
    assert first.parts["activations"] == 4 * last.parts["activations"]
    assert "logits" in last.parts
    assert "logits" not in first.parts
    few = memory.training(PUBLISHED["8x7B"], Layout(pipeline=4), 32, dataclasses.replace(work, global_batch=16))
    assert few[0].parts["activations"] == few[1].parts["activations"]


def test_the_first_and_the_last_stage_may_have_layers_of_their_own():
    ask = request(nodes=4, **TRAIN)
    fewer = dataclasses.replace(ask.work, first_stage_layers=7, last_stage_layers=7)
    outlook = fit.study(dataclasses.replace(ask, work=fewer))
    assert outlook.stages == (7, 9, 9, 7)
    whole = fit.study(ask).usage[0]
    assert outlook.usage[0].parts["activations"] * 8 == whole.parts["activations"] * 7
    wrong = dataclasses.replace(ask, work=dataclasses.replace(ask.work, first_stage_layers=7))
    with pytest.raises(LayoutError, match="32 layers leave 25 for 3 other stages of PP 4"):
        fit.study(wrong)
    assert "--first-stage-layers 0" in [s.options for s in suggest.find(wrong)]


SELENE = profile.load("selene")


def request(shape="8x7B", *, nodes=None, gpus=8, **layout):
    cluster = SELENE.model_copy(
        update={"node": SELENE.node.model_copy(update={"gpus": gpus, "nvlink_domain": gpus})}
    )
    work = TrainingWork(sequence_length=4096, micro_batch=1, global_batch=256)
    return Request(cluster=cluster, layout=Layout(**layout), nodes=nodes, shape=PUBLISHED.get(shape), work=work)


TRAIN = {"pipeline": 4, "expert": 8}


def test_the_preset_fits_selene():
    outlook = fit.study(request(nodes=4, **TRAIN))
    assert (outlook.world, outlook.data, outlook.expert_data, outlook.micro_batches) == (32, 8, 1, 32)
    assert outlook.tokens_a_step == 2**20
    assert outlook.bubble == pytest.approx(3 / 35)
    assert not outlook.shortage
    assert not outlook.tight
    assert [e.islands for e in outlook.exchanges] == [1]


def test_8x22b_needs_more_than_8x7b():
    outlook = fit.study(request("8x22B", nodes=4, **TRAIN))
    assert "stage 1 of 4 needs 131.3 GiB" in outlook.shortage
    assert "a GPU has 80" in outlook.shortage
    found = suggest.find(outlook.request)
    assert found
    assert all(not s.outlook.shortage for s in found)


def test_a_model_nobody_knows_is_not_checked_and_says_so():
    outlook = fit.study(request("unknown", nodes=4, **TRAIN))
    assert outlook.unchecked == "the model's shape isn't known here"
    assert not outlook.usage


def test_experts_over_two_nodes_cost_fabric():
    outlook = fit.study(request(nodes=8, gpus=4, **TRAIN))
    [experts] = outlook.exchanges
    assert experts.islands == 2
    # Half of two copies of 4096 bf16 numbers, out and back, forward and backward.
    assert experts.token_bytes == 4 * 2 * 4096 * 2 / 2
    assert experts.step_bytes == experts.token_bytes * 4096 * 32 * 8
    assert experts.step_seconds == pytest.approx(experts.step_bytes / 25e9)  # one HDR rail a GPU
    assert describe.exchange_text(experts).endswith("32 GiB a GPU and step, about 1.4 s")


def test_a_server_over_two_nodes_is_warned_of_too():
    ask = request(gpus=4, expert=8)
    [experts] = fit.study(dataclasses.replace(ask, work=ServingWork(max_batch=64, max_tokens=4096))).exchanges
    assert (experts.axis, experts.islands) == ("EP", 2)
    assert experts.token_bytes == 2 * 2 * 4096 * 2 / 2  # there is no backward pass
    assert describe.exchange_text(experts).endswith("16 KiB a token and layer over the fabric")


def test_a_server_that_cannot_hold_one_request_is_refused():
    work = ServingWork(max_batch=64, max_tokens=4096)
    ask = dataclasses.replace(request(), work=work, layout=Layout())
    outlook = fit.study(ask)
    assert "weights take 87.0 of a GPU's 80 GiB" in outlook.shortage
    assert not fit.study(dataclasses.replace(ask, work=dataclasses.replace(work, fp8_experts=True))).shortage
    assert "--pp 2" in [s.options for s in suggest.find(ask)]
    two = fit.study(dataclasses.replace(ask, layout=Layout(pipeline=2)))
    assert not two.shortage
    assert two.cache_room > work.cache_tokens
    many = dataclasses.replace(work, max_batch=1024)
    assert "of 1024 requests of 4096 tokens at once" in fit.study(dataclasses.replace(two.request, work=many)).tight


ONE_ANSWER = ServingWork(max_batch=1, max_tokens=64)
REFUSED = [  # what is asked, what is said, what is near
    (request(nodes=3, **TRAIN), "expert DP = 24 / (ETP 1 x EP 8 x PP 4) = 0.75, not whole", "--nodes 4"),
    (request(nodes=4, pipeline=64, expert=8), "layers / PP = 32 / 64 leaves stages without layers", "--pp 4"),
    (request(nodes=4, pipeline=4, expert=3), "experts / EP = 8 / 3 isn't whole", "--ep 8"),
    (request(nodes=4, pipeline=4, expert=16), "experts / EP = 8 / 16 isn't whole", "--ep 8"),
    (request(nodes=5, gpus=4, **TRAIN), "5 nodes x 4 GPUs = 20 ranks don't fit", "--nodes 8"),
    (request(nodes=4, tensor=3, **TRAIN), "query groups / TP = 8 / 3", "--tp 1"),
    (
        dataclasses.replace(request(pipeline=2, context=2), work=ServingWork(max_batch=1, max_tokens=64)),
        "--cp: 2",
        "--cp 1",
    ),
]


@pytest.mark.parametrize(("asked", "said", "near"), REFUSED)
def test_what_cannot_be_is_refused_with_what_can(asked, said, near):
    with pytest.raises(LayoutError) as caught:
        fit.study(asked)
    assert said in str(caught.value)
    told = str(suggest.explained(caught.value, asked))
    assert f"\n  {near} " in told.partition("Nearest that fit:")[2]


@pytest.mark.parametrize(
    ("work", "said", "near"),
    [
        ({"global_batch": 4}, "--global-batch: 4 = micro batch 1 x DP 8 x 0.5", "--global-batch 8"),
        ({"global_batch": 12}, "use a multiple of 8", "--global-batch 16"),
        ({"micro_batch": 1_000_000}, "use a multiple of 8000000", "--micro-batch 2"),
        ({"micro_batch": 64}, "use a multiple of 512", "--micro-batch 2"),
    ],
)
def test_a_batch_that_does_not_come_out(work, said, near):
    ask = request(nodes=4, **TRAIN)
    ask = dataclasses.replace(ask, work=dataclasses.replace(ask.work, **work))
    with pytest.raises(LayoutError, match=said.replace("(", r"\(")):
        fit.study(ask)
    assert near in [s.options for s in suggest.find(ask)]


def test_an_odd_sequence_cannot_be_shared_out():
    ask = request(nodes=4, tensor=2, **TRAIN)
    ask = dataclasses.replace(ask, work=dataclasses.replace(ask.work, sequence_length=4095))
    with pytest.raises(LayoutError, match=r"--sequence-length: 4095 / \(TP 2\) .* multiple of 2"):
        fit.study(ask)


def test_nearest_are_few_changes_then_small_bubbles_then_memory():
    found = suggest.find(request("8x22B", nodes=8, pipeline=8, expert=8))
    keys = [(len(s.changes), round(s.outlook.bubble, 3)) for s in found]
    assert keys == sorted(keys)
    for one, other in itertools.permutations(found, 2):
        assert not one.changes.items() < other.changes.items(), "a change too many"
    assert len(found) <= suggest.SHOWN


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["8x7B", "8x22B", "unknown"]),
    st.integers(1, 70),
    st.sampled_from([1, 2, 4, 8, 16]),
    st.fixed_dictionaries({axis: st.integers(1, 70) for axis in ("tensor", "pipeline", "expert", "expert_tensor")}),
    st.integers(1, 2048),
    st.integers(1, 64),
)
def test_whatever_is_asked_ends_in_an_outlook_or_a_refusal(model, nodes, gpus, layout, batch, micro):
    ask = request(model, nodes=nodes, gpus=gpus, **layout)
    ask = dataclasses.replace(ask, work=dataclasses.replace(ask.work, global_batch=batch, micro_batch=micro))
    try:
        outlook = fit.study(ask)
    except LayoutError:
        return
    axes = ask.layout
    assert outlook.world == axes.tensor * axes.pipeline * axes.context * outlook.data
    assert outlook.world == axes.expert_tensor * axes.expert * axes.pipeline * outlook.expert_data
    assert batch == micro * outlook.data * outlook.micro_batches
    assert 0 <= outlook.bubble < 1


def test_a_plan_that_memory_cannot_hold_is_refused_unless_forced():
    plan = jobs.plan_finetune(SELENE, model="mistralai/Mixtral-8x22B-v0.1", ask=jobs.Ask(nodes=4))
    with pytest.raises(suggest.Refused, match="--force submits anyway"):
        describe.require(plan, force=False)
    describe.require(plan, force=True)
    describe.require(jobs.plan_finetune(SELENE, ask=jobs.Ask(nodes=4)), force=False)
