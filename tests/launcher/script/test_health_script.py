"""The health check in the script: for every runtime and way to ask for GPUs, and only where it is wanted."""

import pytest

from launcher.cluster import profile
from launcher.planning import jobs
from launcher.script import lint, render


@pytest.fixture
def script(cluster):
    def script(*, runtime="none", gpu_request="gres", health_check=True, **more) -> str:
        image = {} if runtime == "none" else {"image": "/images/a.sqsh"}
        container = cluster.container.model_copy(update={"runtime": runtime, **image})
        update = {"container": container, "gpu_request": gpu_request, "health_check": health_check, **more}
        return render.render(
            jobs.plan_finetune(cluster.model_copy(update=update), ask=jobs.Ask(nodes=4)), "/runs/r"
        )

    return script


@pytest.mark.parametrize("runtime", ["none", "pyxis", "apptainer", "docker"])
@pytest.mark.parametrize("gpu_request", ["gres", "gpus-per-node", "gpus-per-task", "none"])
def test_one_process_a_node_with_all_of_its_gpus_before_the_ranks(script, runtime, gpu_request):
    text = script(runtime=runtime, gpu_request=gpu_request)
    lint.check(text)
    check, ranks = text.index("megatron_mixtral.jobs.health"), text.index("launch &")
    assert check < ranks
    assert "srun --kill-on-bad-exit=0 --export=ALL --ntasks=4 --ntasks-per-node=1" in text
    assert ("    --gpus-per-task=8 " in text) == (gpu_request == "gpus-per-task")
    assert "--gpus 8\n" in text


def test_it_is_off_unless_asked_for(script):
    assert "health" not in script(health_check=False)


def test_a_job_that_isnt_resumed_may_come_back_from_its_check(cluster):
    checked = cluster.model_copy(update={"health_check": True})
    text = render.render(jobs.plan_tiny(checked, output="/x"), "/runs/r")
    assert "Requeue=1" in text
    assert "Requeue=0" in text


def test_on_this_machine_there_is_none(cluster):
    local = profile.load("local").model_copy(update={"health_check": True})
    assert "health" not in render.render(jobs.plan_tiny(local, output="/x"), "/runs/r")
