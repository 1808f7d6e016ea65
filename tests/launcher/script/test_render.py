"""Scripts: what a profile asks for stands in them, and nothing gets in unquoted."""

import json
import subprocess

import jinja2
import pytest

from launcher.cluster import profile
from launcher.errors import UsageError
from launcher.planning import jobs
from launcher.script import bundle, lint, render, templates

NASTY = "a'b\"c $(touch canary) `touch canary` ; touch canary # é %j"


def script(path, job="finetune", **asked) -> str:
    text = render.render(jobs.PLANS[job](profile.read(path), **asked), "/shared/runs/RUN")
    lint.check(text)
    return text


def directives(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


def test_directives_say_what_the_profile_says(write_profile):
    path = write_profile(
        "qos: high\ntime: 90\nconstraint: a100&ib\ncomment: two words\nextra: {mail-type: END, contiguous: true}"
    )
    assert directives(script(path)) == [
        "job-name=finetune",
        "account=llm",
        "partition=gpu",
        "qos=high",
        'constraint="a100&ib"',
        'comment="two words"',
        "nodes=4",
        "ntasks-per-node=8",
        "cpus-per-task=8",
        "gpus-per-node=8",
        "mem=512G",
        "time=90",
        "signal=B:USR2@300",
        "open-mode=append",
        "requeue",
        "output=/shared/runs/RUN/logs/slurm-%j.out",
        "mail-type=END",
        "contiguous",
    ]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("gres", ["gres=gpu:8"]),
        ("gpus-per-node", ["gpus-per-node=8"]),
        ("gpus-per-task", ["ntasks=32", "gpus-per-task=1"]),
        ("none", []),
    ],
)
def test_gpus_are_asked_for_in_the_clusters_own_way(write_profile, style, expected):
    text = script(write_profile(f"gpu_request: {style}"))
    assert [d for d in directives(text) if d.startswith(("gpus-", "gres", "ntasks="))] == expected
    assert ("--gpu-bind=none" in text) == (style == "gpus-per-task")


def test_jobs_without_gpus_ask_for_none(write_profile):
    assert not any(
        "gpu" in d for d in directives(script(write_profile("partition: cpu"), "prepare", files=("/a",)))
    )


def test_exclusive_nodes_come_with_all_their_memory(write_profile):
    lines = directives(script(write_profile("exclusive: true")))
    assert {"exclusive", "mem=0"} <= set(lines)


def test_jobs_that_cannot_resume_are_not_requeued(write_profile):
    text = script(write_profile(), "tiny", output="/shared/tiny")
    assert "no-requeue" in directives(text)
    assert "scontrol requeue" not in text


def test_percent_signs_of_a_path_are_not_patterns(cluster):
    text = render.render(jobs.plan_serve(cluster), "/shared/100%/RUN")
    assert "output=/shared/100%%/RUN/logs/slurm-%j.out" in text


def test_nothing_above_the_directives(write_profile):
    lines = script(write_profile()).splitlines()
    assert lines[0] == "#!/bin/bash"
    assert lines[1].startswith("#SBATCH")


def test_pyxis(write_profile):
    text = script(write_profile("container: {runtime: pyxis, image: 'nvcr.io#x/y:1', mounts: ['/lustre:/l:ro']}"))
    assert "--container-image='nvcr.io#x/y:1'" in text
    assert "--container-mounts=/lustre:/l:ro,/shared/models:/shared/models,/shared/data:/shared/data" in text
    assert "--no-container-mount-home" in text
    assert "MASTER_ADDR" in text.split("--container-env=")[1].splitlines()[0]


def test_apptainer(write_profile):
    text = script(write_profile("container: {runtime: apptainer, image: /i.sif}\nenvironment: {NCCL_DEBUG: INFO}"))
    assert "apptainer exec --no-home --nv" in text
    assert "--bind /shared/models:/shared/models" in text
    body = text.split("<<'END_OF_RANK'")[1]
    assert "export NCCL_DEBUG=INFO" in body  # an image's own value must not win


def test_docker(write_profile):
    text = script(write_profile("container: {runtime: docker, image: x/y}\nenvironment: {NCCL_DEBUG: INFO}"))
    assert "docker run --rm" in text
    assert "--env NCCL_DEBUG \\" in text  # by name: a value would show in ps


def test_inputs_outside_the_shared_folders_are_mounted_too(write_profile):
    path = write_profile("container: {runtime: pyxis, image: x}")
    assert ",/elsewhere/model:/elsewhere/model" in script(path, model="/elsewhere/model")
    with pytest.raises(UsageError, match="can't be mounted"):
        script(path, model="/else:where")


def test_an_environment_stays_as_written(write_profile):
    text = script(write_profile("environment: {A: 'x $(y) `z`', B: 3}"))
    assert "export A='x $(y) `z`'\n" in text
    assert "export B=3\n" in text


def test_hostile_values_are_quoted_everywhere(write_profile):
    path = write_profile(f"comment: {json.dumps(NASTY)}")
    text = script(path, model=f"/x/{NASTY}", data=f"/y/{NASTY}")
    outside = text.split("<<'END_OF_CONFIG'")[0] + text.split("\nEND_OF_CONFIG\n")[1]
    assert [line for line in outside.splitlines() if "canary" in line] == [
        r'''#SBATCH --comment="a'b\"c $(touch canary) `touch canary` ; touch canary # é %j"'''
    ]


def test_a_template_that_forgets_a_filter_is_refused(cluster):
    environment = templates.environment()
    plan = jobs.plan_serve(cluster)
    with pytest.raises(UsageError, match="without a quoting filter"):
        environment.from_string("echo {{ plan.name }}").render(plan=plan)
    assert environment.from_string("echo {{ plan.name | sh }} {{ plan.world }}").render(plan=plan) == "echo serve 2"
    with pytest.raises(jinja2.UndefinedError):
        environment.from_string("{{ plna | sh }}").render(plan=plan)
    with pytest.raises(jinja2.exceptions.SecurityError):
        environment.from_string("{{ plan.__class__.__mro__ | sh }}").render(plan=plan)


def test_a_bundle_goes_into_a_new_folder_only(cluster, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("taken", "taken/file"):
        with pytest.raises(UsageError, match=r"--bundle: .* isn't empty"):
            bundle.write(jobs.plan_finetune(cluster), tmp_path / name)
    for name in ("empty", "new/one"):
        written = bundle.write(jobs.plan_finetune(cluster), tmp_path / name, asked=["export", "a b"])
        script, config, readme = (path.read_text() for path in written)
        lint.check(script)
        assert config == render.config_text(jobs.plan_finetune(cluster))
        assert "model:" not in script
        assert "mixlaunch export 'a b'" in readme


def test_a_local_bundle_runs_where_it_lies(tmp_path):
    local = profile.load("local").model_copy(update={"python": "/bin/true"})
    made = tmp_path / "made"
    bundle.write(jobs.plan_finetune(local, model="/m"), made)
    subprocess.run(["bash", "made/job.sbatch"], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    (run,) = (tmp_path / "state" / "mixlaunch" / "runs").iterdir()
    assert (run / "config.yaml").read_text() == (made / "config.yaml").read_text()
