"""`clusters new` and `clusters check` on what real sites' Slurms say: the profile expected of each, and why not."""

from collections.abc import Mapping

import pytest
import yaml
from recorded_slurm import NAMES, SITES, Recorded

from launcher.cluster import discover, profile
from launcher.diagnose import profile_check
from launcher.errors import Fault
from launcher.host.local import Local
from launcher.slurm import inventory


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The text that `clusters new` writes on a site."""

    def write(site: str) -> str:
        monkeypatch.setattr(discover, "HERE", Recorded(site))
        return discover.write(None, tmp_path / f"{site}.yaml").read_text()

    return write


@pytest.mark.parametrize("site", [name for name in NAMES if name != "old"])
def test_the_profile_of_each_site(site, written):
    made = yaml.safe_load(written(site))
    expected = yaml.safe_load((SITES / site / "expected.yaml").read_text())
    assert {key: made.get(key) for key in expected} == expected


def test_a_slurm_that_is_too_old_is_told_in_plain_words(written):
    with pytest.raises(Fault, match=r"^this cluster runs Slurm 20\.11\.9; mixlaunch needs 22\.05 or newer$"):
        written("old")


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("priv", "partition: gpu\n"),  # the others aren't offered
        ("closed", "partition: gpu  # also with GPUs: owner\n"),
        ("multi", "account: lp_old  # also yours: lp_shared, lp_new\n"),
        ("foreign_account", "account: ml  # also yours: shared\n"),
        ("het", "# constraint: v100  #"),
        ("sherlock", "# constraint: 80gb  #"),
        ("mig", "# These nodes also have 12 x 2g.20gb.\n"),
        ("kept", "cpus: 56  # as Slurm counts them, without 8 for the system;"),
        ("limits", "# A job of this partition gets 2 nodes at most.\n"),
        ("limits", "cpus: 24  # the most that the partition gives of 64\n"),
        ("nomem", "# memory_gb: left out; Slurm doesn't know the nodes' memory"),
        ("tacc", "partition: normal  # may have GPUs that Slurm doesn't count: gpu-a100\n"),
        ("no_nodes", "# node: the partition has none now\n"),
        ("qos_of_partition", "qos: high  # also allowed: long\n"),
    ],
)
def test_what_is_said_beside_the_keys(site, said, written):
    assert said in written(site)


def test_accounts_are_asked_of_this_cluster_alone(monkeypatch, tmp_path):
    host = Recorded("multi")
    inventory.ask(host)
    asked = [call for call in host.calls if call[0] == "sacctmgr" and "associations" in call]
    assert asked
    assert all("cluster=multi" in call for call in asked)


def test_what_a_profile_cant_hold_is_left_out_and_told(monkeypatch, tmp_path):
    odd = Recorded("digits", lambda text: text.replace("gpu:1080ti", "gpu:10 80+ti"))
    monkeypatch.setattr(discover, "HERE", odd)
    made = discover.write(None, tmp_path / "x.yaml")
    assert profile.read(made).node.gpus == 4
    assert "left out: gpu_type: 10 80+ti" in made.read_text()


def finding(site, what: str, *overrides: str, monkeypatch, tmp_path, host: Recorded | None = None):
    host = host or Recorded(site)
    monkeypatch.setattr(Local, "call", lambda _, *words, **more: host.call(*words))
    path = tmp_path / "own.yaml"
    path.write_text("scheduler: slurm\npartition: gpu\npaths: {models: /m, data: /d, runs: /r}\n")
    told = profile_check._of_slurm(profile.read(path, overrides), inventory.ask(host))
    found = [one for one in told if one.what == what]
    return (found[-1].verdict, found[-1].why) if found else ("", "")


@pytest.mark.parametrize(
    ("site", "what", "overrides", "verdict", "why"),
    [
        ("digits", "GPUs a node", ["node.gpus=4", "node.gpu_type=2080ti"], "ok", "4 on 7 nodes of gpu"),
        ("digits", "GPU type", ["node.gpus=4", "node.gpu_type=3090"], "", ""),
        ("digits", "GPU type", ["node.gpus=4", "node.gpu_type=2080TI"], "failed", "did you mean '2080ti'"),
        ("digits", "GPU type", ["node.gpus=4"], "unknown", "any of 1080ti, 2080ti, 3090, titanx"),
        ("digits", "cores a node", ["node.gpus=4", "node.gpu_type=3090", "node.cpus=64"], "ok", "64 of 64"),
        ("digits", "cores a node", ["node.gpus=4", "node.gpu_type=2080ti", "node.cpus=64"], "failed", "32 at most"),
        ("mig", "GPUs a node", ["node.gpus=12", "node.gpu_type=2g.20gb"], "ok", "12 on 3 nodes"),
        ("mig", "GPU type", ["node.gpus=56", "node.gpu_type=1g.10gb"], "", ""),
        ("kept", "cores a node", ["node.gpus=4", "node.cpus=64"], "failed", "nodes of gpu have 56 at most"),
        ("kept", "cores a node", ["node.gpus=4", "node.cpus=56"], "ok", "56 of 56"),
        ("limits", "cores a node", ["node.gpus=4", "node.cpus=32"], "failed", "nodes of gpu have 24 at most"),
        ("limits", "memory a node", ["node.gpus=4", "node.memory_gb=256"], "failed", "128 GB at most"),
        ("limits", "partition", [], "ok", "gpu, 4 nodes, at most 2 for a job"),
        ("memory_zero", "memory a node", ["node.memory_gb=8"], "failed", "Slurm doesn't know the memory"),
        ("memory_not_counted", "memory a node", ["node.memory_gb=8"], "ok", "doesn't count memory"),
        ("priv", "partition", ["partition=owner_chem"], "failed", "owner_chem takes jobs of chem alone"),
        ("closed", "partition", ["partition=maint"], "failed", "maint takes jobs of root alone"),
        ("foreign_account", "account", ["account=oldproj"], "failed", "no association with 'oldproj'"),
        (
            "qos_of_partition",
            "QoS",
            ["account=ml"],
            "failed",
            "takes long, high, not your default normal; give qos",
        ),
        ("qos_of_partition", "QoS", ["account=ml", "qos=long"], "ok", "long"),
        ("old", "Slurm version", ["partition=compute"], "failed", "mixlaunch needs 22.05 or newer"),
        ("sherlock", "constraint", ["constraint=GPU_SKU:A100_SXM4&80gb"], "ok", ""),
        ("sherlock", "constraint", ["constraint='[CPU_FRQ:2.75GHz*2&GPU_CC:8.6*1]'"], "ok", ""),
        ("sherlock", "constraint", ["constraint=(IB:HDR|IB:EDR)"], "failed", "'IB:EDR'; did you mean 'IB:HDR'"),
        ("sherlock", "constraint", ["constraint=40gb"], "failed", "has '40gb'; did you mean '80gb'"),
    ],
)
def test_what_check_finds(site, what, overrides, verdict, why, monkeypatch, tmp_path):
    found = finding(site, what, *overrides, monkeypatch=monkeypatch, tmp_path=tmp_path)
    assert found[0] == verdict
    assert why in found[1]


class Hierarchy(Recorded):
    """ml is below physics, which is below root."""

    above: Mapping[str, str] = {"ml": "physics", "physics": "root"}

    def call(self, program: str, *arguments: str, timeout: float = 0) -> str:
        if "format=user,parentname" in arguments:
            account = next(word for word in arguments if word.startswith("account=")).partition("=")[2]
            return f"|{self.above.get(account, '')}\nada|\n"
        text = super().call(program, *arguments)
        return text.replace("AllowAccounts=ALL", "AllowAccounts=physics,sandbox")


def test_a_partition_for_an_account_is_for_those_below_it(monkeypatch, tmp_path):
    host = Hierarchy("qos_of_partition")
    assert inventory.parents("ml", "qos_of_partition", host) == ["physics", "root"]
    found = finding("", "account", "account=ml", monkeypatch=monkeypatch, tmp_path=tmp_path, host=host)
    assert found == ("ok", "ml")
    host.above = {"ml": "chemistry", "chemistry": "ml"}  # a ring ends too
    found = finding("", "account", "account=ml", monkeypatch=monkeypatch, tmp_path=tmp_path, host=host)
    assert found == ("failed", "ml may not use gpu")


@pytest.mark.parametrize("value", ["3090", '"2080ti"', "3g.40gb", "1g.10gb", "A100", "nvidia_h100_80gb_hbm3", "8"])
def test_every_type_of_gpu_can_be_written(value, write_profile):
    assert profile.read(write_profile(), [f"node.gpu_type={value}"]).node.gpu_type == value.strip('"')
