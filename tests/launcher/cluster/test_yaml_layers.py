"""Layers of a profile: parents below, overrides above; whoever wrote a mistake is told where."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.cluster import profile, yaml_layers
from launcher.errors import ProfileError, UsageError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of profiles that --cluster finds by name."""
    clusters = tmp_path / "clusters"
    clusters.mkdir()
    monkeypatch.setenv("MIXLAUNCH_CLUSTERS", str(clusters))
    return clusters


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(text)
    return path


def refused(path, *overrides) -> str:
    with pytest.raises(UsageError) as caught:
        profile.read(path, overrides)
    return str(caught.value)


BASE = """
description: everybody's
scheduler: slurm
partition: gpu
account: llm
node: {gpus: 8, cpus: 64}
container: {runtime: pyxis, image: i, mounts: [/a, /b]}
environment: {NCCL_DEBUG: WARN, OMP_NUM_THREADS: 8}
paths: {models: /m, data: /d, runs: /r}
extra: {mail-type: END}
"""


def test_a_profile_extends_one_by_name(folder):
    write(folder, "base", "name: called\n" + BASE)
    child = """
extends: base
partition: high
account: ~
node: {gpus: 4}
container: {mounts: [/c]}
environment: {NCCL_DEBUG: ~, NEW: 1}
paths: {runs: /mine}
"""
    read = profile.read(write(folder, "child", child))
    assert (read.name, read.description) == ("child", "everybody's")  # a name is one's own
    assert (read.partition, read.account) == ("high", None)  # null takes away
    assert (read.node.gpus, read.node.cpus) == (4, 64)  # sections merge
    assert read.container.mounts == ("/c",)  # lists replace
    assert read.environment == {"OMP_NUM_THREADS": "8", "NEW": "1"}
    assert (read.paths.models, read.paths.runs) == ("/m", "/mine")
    assert read.extra == {"mail-type": "END"}


def test_parents_have_parents_and_paths_start_from_the_file(folder, tmp_path):
    write(folder, "base", BASE)
    write(tmp_path / "team", "middle", "extends: ../clusters/base.yaml\nqos: high")
    read = profile.read(write(tmp_path / "me", "mine", "extends: ../team/middle.yaml\naccount: me"))
    assert (read.partition, read.qos, read.account) == ("gpu", "high", "me")


def test_ones_own_profile_may_extend_the_one_that_it_hides(folder):
    read = profile.read(write(folder, "selene", "extends: selene\naccount: me"))
    assert (read.name, read.account, read.partition) == ("selene", "me", "luna")


def test_a_circle_is_refused(folder):
    path = write(folder, "a", "extends: b")
    write(folder, "b", "\nextends: a")
    assert "b.yaml:2: extends: a circle, a.yaml -> b.yaml -> a.yaml" in refused(path)
    path = write(folder, "self", "extends: ./self.yaml")
    assert "extends: a circle, self.yaml -> self.yaml" in refused(path)


@pytest.mark.parametrize(
    ("parent", "said"),
    [
        ("selen", "child.yaml:2: extends: unknown cluster 'selen'; did you mean 'selene'? There are: "),
        ("./none.yaml", "child.yaml:2: extends: "),
        ("[a, b]", "child.yaml:2: extends: give the name or the path of one profile"),
        ("", "child.yaml:2: extends: give the name"),
        ("$NO_SUCH_VARIABLE", "child.yaml:2: extends: $NO_SUCH_VARIABLE isn't set"),
    ],
)
def test_a_missing_parent_is_named_with_its_line(folder, parent, said):
    assert said in refused(write(folder, "child", f"scheduler: slurm\nextends: {parent}\n"))


def test_a_mistake_is_told_with_the_file_that_holds_it(folder):
    base = write(folder, "base", BASE.replace("gpus: 8", "gpuz: 8"))
    child = write(folder, "child", "\n\nextends: base\nnode: {cpus: many}\ntime: soon\n")
    message = refused(child)
    line = base.read_text().splitlines().index("node: {gpuz: 8, cpus: 64}") + 1
    assert f"{base}:{line}: unknown key 'node.gpuz'; did you mean 'gpus'?" in message
    assert f"{child}:4: node.cpus" in message
    assert f"{child}:5: time" in message


def test_a_mistake_between_two_keys_is_told_at_one_of_them(folder):
    write(folder, "base", BASE)
    child = write(folder, "child", "extends: base\nextra:\n  nyce: 3")
    assert f"{child}:3: extra: sbatch of Slurm 22.05 has no --nyce" in refused(child)


def test_a_key_that_is_there_twice_is_refused(folder):
    path = write(folder, "twice", BASE + "partition: other\n")
    assert f":{len(path.read_text().splitlines())}: partition is there twice" in refused(path)


def test_anchors_and_merges_are_fine(folder):
    text = BASE.replace("node: {", "node: &n {") + "serve: {port: 5001}\n"
    assert profile.read(write(folder, "anchored", text)).node.gpus == 8


def read_with(folder, *overrides):
    return profile.read(write(folder, "base", BASE), overrides)


def test_overrides_lie_above_the_file(folder):
    read = read_with(
        folder,
        "node.gpus=4",
        "environment.NCCL_DEBUG=INFO",
        "extra.mail-type=FAIL",
        "exclusive=true",
        "account=",
        "container.mounts=[/x, '/y:/z:ro']",
        "node={cpus: 2}",
        "time=12:00:00",
    )
    assert (read.node.gpus, read.node.cpus, read.exclusive, read.account) == (4, 2, True, None)
    assert read.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "8"}
    assert read.extra == {"mail-type": "FAIL"}
    assert read.container.mounts == ("/x", "/y:/z:ro")
    assert read.time == "12:00:00"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("node.gpuz=4", "unknown key 'node.gpuz'; did you mean 'gpus'?"),
        ("gpus=4", "unknown key 'gpus'; did you mean 'node.gpus'?"),
        ("node.gpus.x=4", "node.gpus"),
        ("node.gpus=four", "node.gpus"),
        ("node=4", "node"),
        ("node.gpus", "write KEY=VALUE"),
        ("=4", "write KEY=VALUE"),
        (".gpus=4", "write KEY=VALUE"),
        ("extends=selene", "only a file can extend another"),
        ("time=soon", "time: 'soon' isn't a time limit"),
        ("comment='a' b", "<unicode string>"),
        ("comment=a\nb", "comment: the character '\\n'"),
        ('comment="a\\nb"', "comment: the character '\\n'"),
        ("comment=$NO_SUCH_VARIABLE", "comment: $NO_SUCH_VARIABLE isn't set"),
        ("environment.A-B=1", "'A-B' isn't the name of an environment variable"),
        ("environment.RANK=1", "RANK is set by the launcher"),
        ("extra.nodes=3", "'nodes' is set by the launcher"),
        ("extra.quiet=true", "'quiet' is set by the launcher"),
        ("container.image=--fakeroot", "would be read as an option"),
        ("login.host=-oProxyCommand=x", "would be read as an option"),
        ("python=-c", "'-c' isn't a path"),
        ("partition=", ""),
        ('partition=""', "partition: empty"),
        ("binding.cpu=cores; x", "isn't srun's"),
        ("binding.numa=[0, 1]", "2 NUMA nodes for 8 GPUs (node.gpus)"),
        ("secrets=[NCCL_DEBUG]", "NCCL_DEBUG is a secret"),
        ("templates.ranks=x", "templates: no part 'ranks'; did you mean 'rank'? There are: "),
        ("templates.rank=", "templates.rank"),
        ("secrets=[A B]", "'A B' isn't the name of an environment variable"),
    ],
)
def test_a_wrong_override_is_named(folder, override, said):
    if not said:
        assert read_with(folder, override).partition is None
        return
    with pytest.raises(UsageError) as caught:
        read_with(folder, override)
    assert str(caught.value).startswith("-o ") or "NCCL_DEBUG" in override
    assert said in str(caught.value)


TEXT = st.text(
    st.characters(exclude_categories=("Cc", "Cs", "Zl", "Zp"), exclude_characters="$\ufffe\uffff"), max_size=60
)


@settings(max_examples=300)
@given(TEXT)
def test_an_override_is_read_as_it_stands_or_refused(text):
    document = None
    try:
        document = yaml_layers._override(f"comment={text}")
    except UsageError:
        assert text.startswith(yaml_layers.STRUCTURED)
        return
    value = document.values["comment"]
    if not text.startswith(yaml_layers.STRUCTURED):
        assert value == text or text in ("true", "false", "null", "~", "") or str(value) == text
    quoted = yaml_layers._override(f"comment={json.dumps(text, ensure_ascii=False)}").values["comment"]
    assert quoted == text


def test_templates_start_from_the_file_that_names_them(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(folder, "base", BASE + "templates: {rank: mine/rank.j2, job: /abs/job.j2}\n")
    child = write(tmp_path / "elsewhere", "child", "extends: base\ntemplates: {directives: ../d.j2}")
    assert profile.read(child, ["templates.secrets=s.j2"]).templates == {
        "rank": str(folder / "mine" / "rank.j2"),
        "job": "/abs/job.j2",
        "directives": str(tmp_path / "d.j2"),
        "secrets": os.path.join(tmp_path, "s.j2"),
    }


def test_a_broken_parent_is_the_parents_mistake(folder):
    base = write(folder, "base", "a: [")
    with pytest.raises(ProfileError, match=str(base)):
        profile.read(write(folder, "child", "extends: base"))
