"""Plans: what is asked for, on a cluster, becomes a configuration that the job reads, or is refused."""

import pytest
import yaml

from launcher.cluster import profile
from launcher.errors import LayoutError, UsageError
from launcher.planning import inputs, jobs
from launcher.script import render
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import JOBS, FinetuneConfig

ASKED = {
    "tiny": {"output": "/x/tiny"},
    "download": {},
    "prepare": {"files": ("/x/a.jsonl", "b.txt")},
    "convert": {"preset": "train"},
    "verify": {"folder": "/x/converted"},
    "finetune": {},
    "serve": {},
}


@pytest.mark.parametrize("cluster_name", ["local", "selene", "sandbox"])
@pytest.mark.parametrize("job", ASKED)
def test_every_plan_is_a_configuration_that_its_job_reads(job, cluster_name):
    plan = jobs.PLANS[job](profile.load(cluster_name), **ASKED[job])
    checks.parse(JOBS[job], yaml.safe_load(render.config_text(plan)), where=job)


def test_only_a_port_that_nobody_asked_for_may_be_another(cluster):
    assert jobs.plan_serve(cluster).config["other_port"] is True
    asked = jobs.plan_serve(cluster, port=7000).config
    assert (asked["port"], asked["other_port"]) == (7000, False)


def test_paths_follow_one_another_without_being_named(cluster):
    download = jobs.plan_download(cluster)
    convert = jobs.plan_convert(cluster)
    prepare = jobs.plan_prepare(cluster, files=("/x/a.txt",))
    finetune = jobs.plan_finetune(cluster)
    assert convert.config["source"] == download.config["output"] == "/shared/models/Mixtral-8x7B-v0.1"
    assert prepare.config["tokenizer"] == download.config["output"]
    assert finetune.config["model"] == convert.config["output"] == "/shared/models/Mixtral-8x7B-v0.1-megatron"
    assert finetune.config["data"] == prepare.config["output"] == "/shared/data/finetune"
    assert jobs.plan_serve(cluster).config["model"] == finetune.config["model"]


def test_a_chat_template_is_an_input_unless_it_is_mixtrals_own(cluster):
    own = jobs.plan_prepare(cluster, files=("/x/a.jsonl",), values={"chat_template": "/x/../y/own.jinja"})
    assert own.config["chat_template"] == "/y/own.jinja"
    assert ("chat template", "/y/own.jinja") in [(given.what, given.path) for given in own.inputs]
    mixtrals = jobs.plan_prepare(cluster, files=("/x/a.jsonl",), values={"chat_template": "mistral"})
    assert mixtrals.config["chat_template"] == "mistral"
    assert len(mixtrals.inputs) == len(own.inputs) - 1


def test_data_is_a_prefix_or_several_to_blend(cluster):
    plan = jobs.plan_finetune(cluster, data=("/d/a:0.7", "/d/b:3"))
    assert plan.config["data"] == ["/d/a:0.7", "/d/b:3.0"]
    assert [given.path for given in plan.inputs][1:] == ["/d/a.idx", "/d/b.idx"]
    checks.parse(FinetuneConfig, yaml.safe_load(render.config_text(plan)), where="config")
    assert jobs.plan_finetune(cluster, data=("/d/a", "/d/b:c")).config["data"] == ["/d/a", "/d/b:c"]
    assert jobs.plan_finetune(cluster, data="/d/a:0.7").config["data"] == "/d/a:0.7"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (("/a:1", "/b"), "give a weight to each data set"),
        (("/a:-1", "/b:1"), "a weight is a number above 0"),
        (("/a:inf", "/b:1"), "a weight is a number above 0"),
        (("/a:1", "/a:2"), "/a is there twice"),
        (("/a\n:1", "/b:1"), "character"),
    ],
)
def test_a_wrong_blend_is_named(cluster, data, said):
    with pytest.raises(UsageError, match=said):
        jobs.plan_finetune(cluster, data=data)


def test_a_model_is_a_repository_a_path_or_a_run(cluster):
    assert jobs.plan_serve(cluster, model="me/Mine").config["model"] == "/shared/models/Mine-megatron"
    assert jobs.plan_serve(cluster, model="/x/y").config["model"] == "/x/y"
    assert jobs.plan_serve(cluster, model="finetune-1234").config["model"] == "/shared/runs/finetune-1234"


def test_the_way_back_starts_from_a_run(cluster):
    plan = jobs.plan_convert(cluster, to="hf", model="finetune-1234")
    assert plan.config["source"] == "/shared/runs/finetune-1234"
    assert plan.config["output"] == "/shared/models/finetune-1234-hf"


def test_legacy_files_are_named_by_their_layout_and_cut_experts_as_upstream_does(cluster):
    def planned(*, values=(), **axes):
        return jobs.plan_convert(cluster, axes=jobs.Axes(**axes), values={"format": "legacy", **dict(values)})

    plan = planned(tensor=2, pipeline=4, expert=2)
    assert plan.config["output"] == "/shared/models/Mixtral-8x7B-v0.1-legacy-TP2PP4EP2"
    assert plan.config["layout"]["expert_tensor"] == 2
    assert planned(tensor=2, expert_tensor=1).config["output"].endswith("-legacy-TP2PP1EP1ETP1")
    assert planned(values={"names": "te"}).config["names"] == "te"
    with pytest.raises(UsageError, match="--layout: legacy needs --to megatron"):
        jobs.plan_convert(cluster, to="hf", values={"format": "legacy"})
    with pytest.raises(UsageError, match="--names: has an effect only with --layout legacy"):
        jobs.plan_convert(cluster, values={"names": "te"})


def test_what_is_verified_is_a_folder_or_what_convert_made(cluster):
    assert jobs.plan_verify(cluster, folder="/x").config == {"folder": "/x"}
    assert jobs.plan_verify(cluster).config["folder"] == jobs.plan_convert(cluster).config["output"]
    assert jobs.plan_verify(cluster, model="me/Mine").config["folder"] == "/shared/models/Mine-megatron"
    with pytest.raises(UsageError, match="DIR and --model: give one of them"):
        jobs.plan_verify(cluster, folder="/x", model="me/Mine")


def test_any_number_of_nodes_shares_a_conversion_and_its_proof(cluster):
    for plan in (jobs.plan_convert, lambda *args, **rest: jobs.plan_verify(*args, folder="/x", **rest)):
        made = plan(cluster, processes=3, ask=jobs.Ask(nodes=5))
        assert (made.nodes, made.tasks_per_node, made.gpus_per_node, made.resumable) == (5, 3, 0, True)


def test_presets(cluster):
    def layout(plan):
        return plan.config["layout"]["tensor"], plan.config["layout"]["expert"], plan.config["layout"]["pipeline"]

    assert layout(jobs.plan_convert(cluster, preset="train")) == (1, 8, 4)
    assert layout(jobs.plan_convert(cluster, preset="inference")) == (1, 1, 2)
    assert layout(jobs.plan_finetune(cluster)) == (1, 8, 4)
    assert layout(jobs.plan_serve(cluster)) == (2, 1, 1)
    assert layout(jobs.plan_finetune(profile.load("local"))) == (1, 1, 1)


def test_finetune_takes_whole_nodes(cluster):
    plan = jobs.plan_finetune(cluster, ask=jobs.Ask(nodes=4))
    assert (plan.nodes, plan.tasks_per_node, plan.gpus_per_node, plan.world) == (4, 8, 8, 32)
    with pytest.raises(LayoutError, match="multiples of 4"):
        jobs.plan_finetune(cluster, ask=jobs.Ask(nodes=3))


def test_serve_takes_two_gpus_and_makes_a_key_beyond_this_machine(cluster):
    plan = jobs.plan_serve(cluster)
    assert (plan.nodes, plan.gpus_per_node, plan.config["port"]) == (1, 2, 5000)
    assert plan.config["host"] == "0.0.0.0"
    assert plan.secrets_made == ("MIXLAUNCH_API_KEY",)
    assert jobs.plan_serve(cluster, host="127.0.0.1").secrets_made == ()
    assert jobs.plan_serve(profile.load("local")).secrets_made == ()


def test_a_rank_gets_its_share_of_a_node(cluster):
    plan = jobs.plan_serve(cluster)
    assert (plan.cpus_per_task, plan.memory) == (8, "128G")
    assert jobs.plan_convert(cluster).cpus_per_task == 8
    assert jobs.plan_prepare(cluster, files=("a",)).cpus_per_task == 64


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (lambda c: jobs.plan_finetune(c, values={"step": 3}), r"no setting 'step'; did you mean steps\?"),
        (lambda c: jobs.plan_finetune(c, values={"steps": 0}), "--steps: 0 must be at least 1"),
        (
            lambda c: jobs.plan_finetune(c, values={"precision": "fp8"}),
            "--precision: 'fp8' isn't one of bf16, fp32",
        ),
        (
            lambda c: jobs.plan_finetune(c, values={"global_batch": 12}),
            r"--global-batch: 12 = micro batch 1 x DP 8 x 1.5",
        ),
        (lambda c: jobs.plan_finetune(c, data="$DATA/x"), r"--data: '\$DATA/x' holds \$DATA"),
        (lambda c: jobs.plan_convert(c, output=""), "--output: empty"),
        (lambda c: jobs.plan_finetune(c, ask=jobs.Ask(name="a b")), "--name: 'a b' isn't a name"),
        (lambda c: jobs.plan_finetune(c, ask=jobs.Ask(time="soon")), "--time: 'soon' isn't a time limit"),
        (lambda c: jobs.plan_finetune(c, axes=jobs.Axes(expert=3)), "experts / EP = 8 / 3"),
        (lambda c: jobs.plan_serve(c, model="a/b/c"), "--model: "),
        (lambda c: jobs.plan_download(c, model="Mixtral"), "isn't a repository of the hub"),
        (lambda c: jobs.plan_prepare(c, files=()), "FILES: give at least one"),
        (lambda c: jobs.plan_convert(c, to="onnx"), "--to: 'onnx' isn't one of megatron, hf"),
        (lambda c: jobs.plan_convert(c, preset="fast"), "--preset: 'fast' isn't one of train, inference"),
        (lambda c: jobs.plan_prepare(c, files=("a",), ask=jobs.Ask(nodes=2)), "prepare runs on one node"),
    ],
)
def test_a_mistake_is_named(cluster, plan, said):
    with pytest.raises(UsageError, match=said):
        plan(cluster)


def test_the_shape_comes_from_the_model_when_it_is_there(tmp_path, cluster):
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "config.json").write_text(
        '{"model_type": "mixtral",'
        ' "num_hidden_layers": 4, "num_local_experts": 8, "num_attention_heads": 8, "num_key_value_heads": 2,'
        ' "intermediate_size": 512, "hidden_size": 256, "vocab_size": 32000, "num_experts_per_tok": 2}'
    )
    shape = inputs.shape(cluster, str(tmp_path))
    assert shape is not None
    with pytest.raises(LayoutError, match="layers / PP = 4 / 8"):
        jobs.plan_finetune(cluster, model=str(tmp_path), shape=shape, axes=jobs.Axes(pipeline=8, expert=1))


def test_missing_inputs_are_all_named_with_what_makes_them(cluster):
    with pytest.raises(UsageError) as caught:
        inputs.require(jobs.plan_finetune(cluster))
    message = str(caught.value)
    assert "weights: /shared/models/Mixtral-8x7B-v0.1-megatron doesn't exist\n  `mixlaunch convert" in message
    assert "data: /shared/data/finetune.idx doesn't exist\n  `mixlaunch prepare" in message


@pytest.mark.parametrize(
    ("model", "experts", "tensor"),
    [("8x7B", False, 1), ("8x7B", True, 1), ("8x22B", False, 2), ("8x22B", True, 2)],
)
def test_adapters_fit_one_node(model, experts, tensor):
    values = {"lora": 16} | ({"lora_experts": True} if experts else {})
    plan = jobs.plan_finetune(profile.load("selene"), model=f"mistralai/Mixtral-{model}-v0.1", values=values)
    assert (plan.nodes, plan.tasks_per_node) == (1, 8)
    assert plan.config["layout"] == {"tensor": tensor, "pipeline": 1, "expert": 8, "expert_tensor": 1, "context": 1}
    assert not plan.outlook.shortage
    assert plan.config["lora"] == 16


def test_a_layout_of_adapters_can_be_asked_for():
    selene = profile.load("selene")
    plan = jobs.plan_finetune(selene, axes=jobs.Axes(pipeline=2, expert=4), values={"lora": 8})
    assert (plan.layout.pipeline, plan.layout.expert, plan.world) == (2, 4, 8)
    assert jobs.plan_finetune(profile.load("local"), values={"lora": 8}).world == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_experts": True}, "--lora-experts: has an effect only with --lora RANK"),
        ({"lora_alpha": 32}, "--lora-alpha: has an effect only with --lora RANK"),
        ({"lora": -1}, "--lora: -1 must be at least 0"),
        ({"lora": 8, "lora_dropout": 1.5}, "--lora-dropout: 1.5 must be between 0 and 1"),
        ({"lora": 8, "lora_dropout": 1}, "must be below 1"),
        ({"lora": 8, "lora_experts": True, "lora_dropout": 0.1}, "adapters of experts have no dropout"),
    ],
)
def test_what_makes_no_adapter_is_refused(values, message):
    with pytest.raises(UsageError, match=message):
        jobs.plan_finetune(profile.load("selene"), values=values)


def test_the_base_of_adapters_is_named_as_a_model_is():
    selene = profile.load("selene")
    plan = jobs.plan_convert(selene, model="/runs/a", to="peft", values={"base": "mistralai/Mixtral-8x7B-v0.1"})
    assert plan.config["base"] == jobs.plan_finetune(selene).config["model"]
    assert plan.config["output"].endswith("/a-peft")
    assert jobs.plan_serve(selene, model="/runs/a", values={"base": "/x/base"}).config["base"] == "/x/base"
