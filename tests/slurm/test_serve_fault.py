"""A server whose rank died ends for good, with that rank's code, on Slurm and on this machine."""

import pytest

from launcher.cluster import profile
from launcher.planning import jobs
from launcher.runs import logs
from launcher.submit import start


@pytest.mark.parametrize("where", ["slurm", "local"])
def test_a_fault_ends_a_server(where, cluster, stub, finish, tmp_path):
    here = cluster if where == "slurm" else profile.load("local")
    fails = stub('[ "$RANK" = 1 ] && exit 7; sleep 60')
    there = here.model_copy(update={"python": fails, "paths": cluster.paths})
    plan = jobs.plan_serve(there, model=str(tmp_path / "models" / "m"), axes=jobs.Axes(pipeline=2))
    assert (plan.resumable, plan.retried) == (True, False)
    run = start.run(plan)
    state = finish(run)
    assert (state.state, state.exit_code) == ("FAILED", 7)
    assert logs.attempts(run.path) == [0]
    assert "failed, and this job isn't retried" in logs.path(run.path, 0, "batch").read_text()
