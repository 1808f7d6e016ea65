"""What a rehearsal changes, and what a sandbox is told: both pure."""

import dataclasses
from pathlib import Path

import pytest

from launcher.cluster import profile
from launcher.planning import jobs
from launcher.sandbox import config as sandbox_config
from launcher.sandbox import rehearsal_plan
from launcher.sandbox.config import ClusterShape, SlurmFiles
from launcher.script import lint, render
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape


@pytest.fixture
def selene():
    return jobs.plan_finetune(profile.load("selene"), ask=jobs.Ask(nodes=4), values={"lr": 3e-4, "micro_batch": 2})


@pytest.fixture
def mirrored(selene, tmp_path):
    return rehearsal_plan.rehearsed(
        selene,
        folder=tmp_path,
        slurm_conf=tmp_path / "slurm.conf",
        python="/usr/bin/python3",
        model=tmp_path / "model",
        data=tmp_path / "data",
    )


def directives(plan):
    return [line for line in render.render(plan, "/run").splitlines() if line.startswith("#SBATCH")]


def test_the_request_and_the_topology_are_the_clusters(selene, mirrored):
    assert directives(mirrored) == directives(selene)
    assert (mirrored.world, mirrored.layout) == (32, selene.layout)
    lint.check(render.render(mirrored, "/run"))


def test_only_what_a_laptop_lacks_is_replaced_and_each_has_a_reason(selene, mirrored):
    told = dict(line.split(":", 1) for line in rehearsal_plan.differences(selene.profile, mirrored.profile))
    assert set(told) == {"binding", "container", "environment", "python", "paths", "slurm_conf"}
    assert all(line.endswith(")") for line in told.values())
    assert "GLOO_SOCKET_IFNAME ib0 -> lo" in told["environment"]


def test_every_part_of_a_profile_that_may_change_has_a_reason():
    assert set(rehearsal_plan.REASONS) <= set(profile.ClusterProfile.model_fields)


def test_training_settings_stay_but_for_size_and_end(mirrored):
    config = mirrored.config
    assert (config["lr"], config["micro_batch"]) == (3e-4, 2)
    assert config["global_batch"] == 2 * 8  # a micro batch for each of the eight replicas
    assert config["sequence_length"] == rehearsal_plan.SEQUENCE


def test_options_that_need_the_real_thing_are_left_out(selene, tmp_path):
    extra = {"licenses": "fs:1", "mail-type": "END"}
    plan = dataclasses.replace(selene, profile=selene.profile.model_copy(update={"extra": extra}))
    places = {name: tmp_path / name for name in ("folder", "slurm_conf", "model", "data")}
    changed = rehearsal_plan.rehearsed(plan, python="p", **places)
    assert changed.profile.extra == {"mail-type": "END"}
    assert any(line.startswith("extra: licenses fs:1 -> nothing") for line in _told(plan, changed))


def _told(plan, changed):
    return rehearsal_plan.differences(plan.profile, changed.profile)


def test_the_difference_of_the_scripts_is_a_diff(selene, mirrored, tmp_path):
    text = rehearsal_plan.script_diff(selene, mirrored, tmp_path / "run-1")
    assert text.startswith("--- selene\n+++ rehearsal\n")
    assert "-    --container-image=" in text
    assert not any(
        line.startswith(("+#SBATCH", "-#SBATCH")) for line in text.splitlines() if "--output" not in line
    )


def test_the_sandbox_takes_the_names_that_the_script_asks_for():
    cluster = profile.load("selene").model_copy(
        update={"partition": "a,b", "account": "Team", "qos": "gold", "constraint": "(a100&ib)|h100*2"}
    )
    shape = rehearsal_plan.shape(jobs.plan_finetune(cluster, ask=jobs.Ask(nodes=4)))
    assert (shape.nodes, shape.gpus, shape.cpus, shape.memory_gb) == (4, 8, 256, 2015)
    assert shape.partitions == (("a", 1), ("b", 1))
    assert (shape.accounts, shape.qos, shape.features) == (("Team",), ("gold",), ("a100", "ib", "h100"))


@pytest.mark.parametrize(
    "axes", [{}, {"tensor": 2}, {"tensor": 8}, {"pipeline": 4, "expert": 8}, {"expert": 16, "expert_tensor": 3}]
)
def test_the_tiny_model_can_be_cut_by_the_layout(axes):
    cut = Layout(**axes)
    small = rehearsal_plan.tiny(cut, {})
    made = MixtralShape(
        num_hidden_layers=small.layers,
        num_local_experts=small.experts,
        num_experts_per_tok=2,
        num_attention_heads=small.heads,
        num_key_value_heads=small.kv_heads,
        intermediate_size=small.intermediate,
        hidden_size=small.hidden,
        head_dim=small.hidden // small.heads,
        vocab_size=32000,
    )
    cut.check(made)
    assert small.hidden % small.heads == 0
    assert small.heads % small.kv_heads == 0


def site(**more):
    fields = {
        "folder": Path("/tmp/s"),
        "sockets": Path("/tmp/s"),
        "user": "me",
        "host": "here",
        "version": (22, 5),
        "controller_port": 21000,
        "database_port": None,
        "node_ports": (21001, 21002),
        "first_job_id": 4321,
    }
    return SlurmFiles(**fields | more)


def test_a_sandbox_is_its_own():
    conf = sandbox_config.slurm_conf(ClusterShape(nodes=2), site())
    assert conf.count("Port=") == 3
    assert "NodeName=sandbox1 NodeHostname=here NodeAddr=127.0.0.1 Port=21002 CPUs=64" in conf
    assert "AuthInfo=socket=/tmp/s/munge.socket" in conf
    assert "FirstJobId=4321" in conf
    assert "accounting_storage/none" in conf


def test_a_higher_partition_preempts_a_lower_one():
    conf = sandbox_config.slurm_conf(ClusterShape(nodes=2), site())
    low, high = [line for line in conf.splitlines() if line.startswith("PartitionName")]
    assert "PreemptMode=REQUEUE" in low
    assert "Default=YES" in low
    assert "PreemptMode=OFF" in high


def test_accounting_is_enforced_where_there_is_any():
    conf = sandbox_config.slurm_conf(ClusterShape(nodes=2), site(database_port=21003))
    assert "AccountingStorageEnforce=associations,limits,qos" in conf
    assert "AccountingStoragePort=21003" in conf


def test_gpus_are_files_or_none():
    assert "File=/tmp/s/gpus/gpu[0-7]" in sandbox_config.gres_conf(ClusterShape(), site())
    assert "File" not in sandbox_config.gres_conf(ClusterShape(gpus=0), site())
    assert "Gres" not in sandbox_config.slurm_conf(ClusterShape(nodes=2, gpus=0), site()).replace("GresTypes", "")


@pytest.mark.parametrize(("version", "text"), [((22, 5), ""), ((24, 11), "CgroupPlugin=disabled\n")])
def test_cgroups_are_left_alone_where_slurm_can_be_told_so(version, text):
    assert sandbox_config.cgroup_conf(site(version=version)) == text
