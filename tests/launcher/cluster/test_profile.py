"""Profiles: what is read, and what each mistake is told."""

import pytest

from launcher.cluster import catalog, profile
from launcher.errors import ProfileError


def refused(path) -> str:
    with pytest.raises(ProfileError) as caught:
        profile.read(path)
    return str(caught.value)


def test_reads_a_file_and_names_the_cluster_after_it(cluster):
    assert (cluster.name, cluster.node.gpus, cluster.paths.runs) == ("cluster", 8, "/shared/runs")


def test_times_stay_text(write_profile):
    # YAML 1.1 reads 12:00:00 as the number 43200.
    assert profile.read(write_profile("time: 12:00:00")).time == "12:00:00"
    assert profile.read(write_profile("time: 90")).time == "90"
    assert profile.read(write_profile("time: 1-00:00:00")).time == "1-00:00:00"


def test_no_stays_a_word(write_profile):
    assert profile.read(write_profile("environment: {A: no, B: 08, C: 1}")).environment == {
        "A": "no",
        "B": "08",
        "C": "1",
    }


def test_an_unknown_key_names_its_line_and_the_nearest_valid_one(write_profile):
    path = write_profile("partitoin: x")
    line = path.read_text().splitlines().index("partitoin: x") + 1
    message = refused(path)
    assert f"cluster.yaml:{line}: unknown key 'partitoin'; did you mean 'partition'?" in message
    assert "qos" in message  # and the valid ones


def test_an_unknown_nested_key_is_found_too(write_profile):
    assert "unknown key 'node.gpuz'; did you mean 'gpus'?" in refused(write_profile("node: {gpuz: 8}"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("scheduler: pbs", "scheduler: input should be 'slurm' or 'local' (got 'pbs')"),
        ("time: tomorrow", "time: 'tomorrow' isn't a time limit"),
        ("node: {gpus: -1}", "node.gpus"),
        ("container: {runtime: pyxis}", "runtime pyxis needs an image"),
        ("container: {runtime: pyxis, image: a, mounts: [data]}", "'data' isn't HOST"),
        ("environment: {A: true}", "environment.A"),
        ("environment: {A-B: 1}", "'A-B' isn't the name of an environment variable"),
        ("extra: {nodes: 3}", "'nodes' is set by the launcher"),
        ("extra: {--nice: 3}", "isn't a long sbatch option"),
        ("extra: {nyce: 3}", "extra: sbatch of Slurm 22.05 has no --nyce; did you mean 'nice'?"),
        ("extra: {oom-kill-step: 1}\nslurm_version: 23.11", "extra: sbatch of Slurm 23.11 has no --oom-kill-step"),
        ("slurm_version: 20.11", "slurm_version: '20.11' isn't a version from 22.05 on"),
        ("scheduler: local\ncontainer: {runtime: pyxis, image: x}", "pyxis is a part of Slurm"),
        ("paths: {models: m, data: /d, runs: /r}", "paths.models: 'm' isn't absolute"),
        ("paths: {models: /m, data: /d}", "paths.runs is missing"),
        ("account: $NO_SUCH_VARIABLE", "account: $NO_SUCH_VARIABLE isn't set"),
        ('comment: "a\\nb"', "comment: the character '\\n'"),
        ("signal_lead: soon", "signal_lead"),
        ("name: ../x", "name: '../x' isn't a name"),
    ],
)
def test_a_wrong_value_is_named(write_profile, more, said):
    assert said in refused(write_profile(more))


def test_every_mistake_is_told_at_once(write_profile):
    message = refused(write_profile("time: never\npartitoin: x"))
    assert "time" in message
    assert "partitoin" in message


@pytest.mark.parametrize("text", ["", "- a", "just words", "a: [", "\0", "a: &x [*x]"])
def test_a_file_that_is_no_profile_is_refused(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert "broken.yaml" in refused(path)


def test_variables_expand_as_the_profile_is_read(write_profile, monkeypatch):
    monkeypatch.setenv("TEAM", "llm")
    path = write_profile("account: $TEAM\npaths: {models: '/p/${TEAM}/m', data: /d, runs: /r}")
    read = profile.read(path)
    assert (read.account, read.paths.models) == ("llm", "/p/llm/m")


def test_own_profiles_hide_built_in_ones(tmp_path, write_profile, monkeypatch):
    folder = tmp_path / "clusters"
    folder.mkdir()
    (folder / "selene.yaml").write_text(write_profile().read_text())
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(folder))
    assert profile.load("selene").partition == "gpu"
    assert {"local", "sandbox", "selene"} <= set(catalog.available())


def test_an_unknown_cluster_lists_those_there_are():
    with pytest.raises(ProfileError, match=r"unknown cluster 'selen'; did you mean 'selene'\? There are: .*local"):
        profile.load("selen")


def test_the_default_is_this_machine(monkeypatch):
    assert profile.load().name == "local"
    monkeypatch.setenv("MIXLAUNCH_CLUSTER", "selene")
    assert profile.load().name == "selene"


def test_every_built_in_profile_reads():
    for path in catalog.available().values():
        assert profile.read(path).name == path.stem
