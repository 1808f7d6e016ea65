"""Templates of the user's own: they replace a part or the whole; what is wrong in them is told with its line."""

import pytest

from launcher import templates
from launcher.cluster import profile
from launcher.errors import UsageError
from launcher.planning import jobs
from launcher.script import lint, render


@pytest.fixture
def rendered(write_profile, tmp_path):
    """Render a job of a profile in which `text` stands for the part `name`."""

    def make(name: str, text: str, *, job="finetune", more: str = "", **asked) -> str:
        (tmp_path / "own.j2").write_text(text)
        path = write_profile(f"templates: {{{name}: own.j2}}\n{more}")
        return render.render(jobs.PLANS[job](profile.read(path), **asked), "/shared/runs/RUN")

    return make


def test_a_part_is_replaced(rendered):
    text = rendered("environment", "module load {{ 'cuda/12' | sh }}\n{% include 'stock/environment.sh.j2' %}")
    assert "\nmodule load cuda/12\n" in text
    lint.check(text)


def test_the_whole_is_replaced(rendered):
    base = "#!/bin/bash\n{% include 'directives.sh.j2' %}\necho {{ plan.name | sh }} {{ plan.world }}\n"
    text = rendered("job", base)
    assert text.splitlines()[0] == "#!/bin/bash"
    assert text.splitlines()[-1] == "echo finetune 32"
    assert "#SBATCH --nodes=4" in text
    lint.check(text)


@pytest.mark.parametrize("name", templates.names())
def test_every_part_can_be_replaced_by_a_copy_of_itself(rendered, write_profile, name):
    runtime = name.removeprefix("container_") if name.startswith("container_") else "none"
    more = f"container: {{runtime: {runtime}, image: x}}" if runtime != "none" else ""
    ours = render.render(jobs.plan_serve(profile.read(write_profile(more))), "/shared/runs/RUN")
    assert rendered(name, templates.source(name), job="serve", more=more) == ours


def test_names_that_parts_once_had_still_work(rendered):
    """A profile's key, and what a supervise of the user's own includes."""
    ours = rendered("requeue_slurm", "again() { exit 7; }\n")
    assert "again() { exit 7; }" in ours
    assert rendered("again_slurm", "again() { exit 7; }\n") == ours
    for include in ('"again_" ~ profile.scheduler ~ ".sh.j2"', '"stock/again_slurm.sh.j2"'):
        assert 'scontrol requeue "$SLURM_JOB_ID"' in rendered("supervise", f"{{% include {include} %}}")


def test_an_unknown_part_lists_those_there_are(rendered):
    said = r"no part 'ranks'; did you mean 'rank'\? There are: .*container_pyxis.*rank"
    with pytest.raises(UsageError, match=said):
        rendered("ranks", "")
    with pytest.raises(UsageError, match="no part"):
        templates.source("../jobs")


def test_a_file_that_is_not_there_is_named(write_profile):
    plan = jobs.plan_serve(profile.read(write_profile("templates: {rank: /no/such.j2}")))
    with pytest.raises(UsageError, match=r"templates.rank: /no/such.j2: No such file"):
        render.render(plan)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("one\n{% if %}", 2, "Expected an expression"),
        ("one\n\n{{ plna | sh }}", 3, "'plna' is undefined"),
        ("{{ plan.nmae | sh }}", 1, "no attribute 'nmae'"),
        ("a\n{{ plan.name }}", 2, "printed without a quoting filter"),
        ("a\n{{ plan.__class__.__mro__ | sh }}", 2, "unsafe"),
        ("a\n{{ plan.config.clear() }}", 2, "unsafe"),
        ("a\nb\n{{ 1 / 0 }}", 3, "division by zero"),
        ("{% include 'nothing.j2' %}", 1, "nothing.j2"),
        ("{% include '../../etc/passwd' %}", 1, "passwd"),
        ("{{ ('a' * 20000) | sh }}", 1, "20000 bytes"),
        ("{% include 'rank.sh.j2' %}", 1, "recursion"),
        ("{{ plan.name | nofilter }}", 1, "nofilter"),
    ],
)
def test_what_is_wrong_in_a_template_is_told_with_its_line(rendered, tmp_path, text, line, said):
    with pytest.raises(UsageError) as caught:
        rendered("rank", text)
    assert str(caught.value).startswith(f"template {tmp_path}/own.j2:{line}: ")
    assert said in str(caught.value)


def test_what_a_template_makes_is_linted(rendered, tmp_path):
    text = rendered("directives", "#SBATCH --nyce=3\n", more="slurm_version: 23.11")
    with pytest.raises(lint.LintError, match=r"sbatch of Slurm 23.11 has no --nyce"):
        lint.check(text, "23.11")


def test_binding_is_srun_s_and_numactl_s(write_profile):
    asked = "binding: {cpu: cores, memory: local, distribution: 'block:block', numa: [3, 3, 1, 1, 7, 7, 5, 5]}"
    path = write_profile(asked)
    text = render.render(jobs.plan_finetune(profile.read(path)))
    assert "    --cpu-bind=cores \\\n    --mem-bind=local \\\n    --distribution=block:block \\\n" in text
    assert "numa=( 3 3 1 1 7 7 5 5 )" in text
    lint.check(text)
    # Two of eight GPUs: which ones isn't known here.
    assert "numactl" not in render.render(jobs.plan_serve(profile.read(path)))
    assert "numactl" not in render.render(jobs.plan_prepare(profile.read(path), files=("/x",)))
    half = profile.read(path, ["node.gpus=4"])
    assert "numactl" not in render.render(jobs.plan_finetune(half))


def test_the_profile_s_gpu_binding_stands_over_ours(write_profile):
    path = write_profile("gpu_request: gpus-per-task\nbinding: {gpu: closest}")
    text = render.render(jobs.plan_finetune(profile.read(path)))
    assert text.count("--gpu-bind=") == text.count("--gpu-bind=closest") == 1
