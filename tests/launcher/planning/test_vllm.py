"""`serve --engine vllm`: one process that gets the GPUs of its layout, and the folder that vLLM can read."""

import pytest

from launcher.cluster.profile import ClusterProfile
from launcher.errors import LayoutError, UsageError
from launcher.planning import jobs
from launcher.script import render

VLLM = {"engine": "vllm"}


@pytest.fixture
def cluster():
    return ClusterProfile.model_validate(
        {
            "name": "c",
            "scheduler": "slurm",
            "node": {"gpus": 8, "cpus": 96},
            "paths": {name: f"/shared/{name}" for name in ("models", "data", "runs")},
        }
    )


def planned(cluster, **more):
    return jobs.plan_serve(cluster, values=VLLM, **more)


def test_a_node_is_one_process_with_all_its_gpus(cluster):
    plan = planned(cluster)
    assert (plan.nodes, plan.tasks_per_node, plan.gpus_per_node, plan.cpus_per_task) == (1, 1, 8, 96)
    assert plan.config["layout"]["tensor"] == 8
    assert "--gpus-per-node=8" in render.render(plan) or "--gres=gpu:8" in render.render(plan)


@pytest.mark.parametrize(
    ("axes", "gpus"),
    [({"tensor": 2}, 2), ({"tensor": 4, "pipeline": 2}, 8), ({"tensor": 4, "expert": 4}, 4), ({"pipeline": 2}, 8)],
)
def test_axes_decide_how_many_of_them(cluster, axes, gpus):
    plan = planned(cluster, axes=jobs.Axes(**axes))
    assert (plan.world, plan.gpus_per_node, plan.cpus_per_task) == (1, gpus, 12 * gpus)
    assert plan.config["layout"]["expert"] == axes.get("expert", 1)


def test_a_repository_is_served_from_its_download_and_a_run_is_exported(cluster):
    assert planned(cluster).config["model"] == "/shared/models/Mixtral-8x7B-v0.1"
    of_run = planned(cluster, model="finetune-1")
    assert of_run.config["model"] == "/shared/runs/finetune-1"
    assert of_run.config["exports"] == "/shared/models"


def test_what_vllm_cannot_do_is_said(cluster):
    with pytest.raises(UsageError, match="--cp, --etp"):
        planned(cluster, axes=jobs.Axes(context=2))
    with pytest.raises(LayoutError, match="EP 2"):
        planned(cluster, axes=jobs.Axes(tensor=8, expert=2))
    with pytest.raises(LayoutError, match="one node: 16 GPUs"):
        planned(cluster, axes=jobs.Axes(tensor=8, pipeline=2))
    with pytest.raises(UsageError, match="--fp8-experts: needs --engine megatron"):
        jobs.plan_serve(cluster, values={**VLLM, "fp8_experts": True})


def test_the_key_is_made_where_others_can_reach_it(cluster):
    assert planned(cluster).secrets_made == ("MIXLAUNCH_API_KEY",)
    assert planned(cluster, host="127.0.0.1").secrets_made == ()
