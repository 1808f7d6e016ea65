"""Training on a real Slurm, disturbed in every way that a week has: it ends as the undisturbed run does.

One small Mixtral over two nodes; what is compared is every tensor of the last checkpoint, bit for bit.
"""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from running import story, wait_until

from launcher.cluster.profile import ClusterProfile
from launcher.common import processes
from launcher.planning import jobs
from launcher.runs import logs, states
from launcher.sandbox import daemons
from launcher.sandbox import record as sandbox_state
from launcher.submit import start

STEPS = 120
VALUES = {
    "sequence_length": 32,
    "micro_batch": 1,
    "global_batch": 4,
    "precision": "fp32",
    "warmup_steps": 2,
    "lr": 0.01,
    "eval_steps": 0,
    "save_interval": 10,
}
SHAPE = {
    "model_type": "mixtral",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
WEIGHTS = """
import sys
from pathlib import Path
from megatron_mixtral.mcore import ranks
from megatron_mixtral.checkpoint import save_load
from megatron_mixtral.model import build
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape
folder = Path(sys.argv[1])
ranks.initialize(Layout(), seed=5)
built = build.build(MixtralShape.from_folder(folder), Layout(), precision="fp32")
save_load.save(folder / "release", built, assets=folder)
"""


class Place:
    """A model, data and a profile of the sandbox with a rank a node."""

    def __init__(self, folder, site) -> None:
        self.folder, self.site = folder, site
        model = folder / "models" / "m"
        model.mkdir(parents=True)
        (model / "config.json").write_text(json.dumps(SHAPE))
        subprocess.run([sys.executable, "-c", WEIGHTS, str(model)], check=True, timeout=120)
        self._write_data(folder / "data")

    @staticmethod
    def _write_data(folder) -> None:
        from megatron_mixtral.data import indexed

        folder.mkdir()
        random = np.random.default_rng(1)
        lengths = random.integers(40, 200, size=60).astype(np.int32)
        tokens = [(np.arange(n) * 5 + random.integers(64)) % 64 for n in lengths]
        np.concatenate(tokens).astype(np.uint16).tofile(folder / "d.bin")
        indexed.write_index(folder / "d.idx", lengths, np.dtype(np.uint16))

    def plan(self, *, steps: int = STEPS, limit: str | None = None, **more) -> jobs.JobPlan:
        profile = ClusterProfile.model_validate(
            {
                "name": "sandbox",
                "scheduler": "slurm",
                "time": "30",
                "node": {"gpus": 1, "cpus": 8, "memory_gb": 64},
                "python": sys.executable,
                "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
                "paths": {name: str(self.folder / name) for name in ("models", "data", "runs")},
                "slurm_conf": str(self.site.slurm_conf),
                "signal_lead": 30,
                **more,
            }
        )
        return jobs.plan_finetune(
            profile,
            model=str(self.folder / "models" / "m"),
            data=str(self.folder / "data" / "d"),
            axes=jobs.Axes(pipeline=2, expert=1),
            ask=jobs.Ask(nodes=2, time=limit),
            values=VALUES | {"steps": steps},
        )


@pytest.fixture(scope="module")
def place(site, tmp_path_factory):
    return Place(tmp_path_factory.mktemp("survival"), site)


def final(run, steps=STEPS):
    """Every tensor of the last checkpoint, optimizer and all."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state = {}
    reader = FileSystemReader(run.path / f"checkpoints/iter_{steps:07}")
    _load_state_dict(state, storage_reader=reader, planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return {name: value for name, value in state.items() if hasattr(value, "shape")}


def finished(run, seconds=200):
    return wait_until(lambda: (state := states.of_run(run)) and not state.active and state, seconds, run)


@pytest.fixture(scope="module")
def undisturbed(place):
    run = start.run(place.plan())
    assert finished(run).state == "COMPLETED", story(run)
    return final(run)


def step_of(run):
    """The newest step done."""
    return max((event["step"] for event in logs.events(run.path) if event["event"] == "step"), default=0)


def wait_for_step(run, step, seconds=120):
    wait_until(lambda: step_of(run) >= step, seconds, run)


def kill_rank(run, rank):
    found = processes.marked(SLURM_JOB_ID=run.job_id, RANK=str(rank), MIXLAUNCH_RUN=str(run.path))
    assert found
    processes.send(lambda: found, signal.SIGKILL)


def check(run, undisturbed, *, attempts):
    state = finished(run)
    assert state.state == "COMPLETED", story(run)
    assert len(logs.attempts(run.path)) >= attempts
    ended = final(run)
    assert ended.keys() == undisturbed.keys()
    assert all((ended[name] == undisturbed[name]).all() for name in ended)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_the_last_rank_killed(place, undisturbed):
    run = start.run(place.plan())
    wait_for_step(run, 25)
    kill_rank(run, 1)
    check(run, undisturbed, attempts=2)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_rank_0_killed_twice(place, undisturbed):
    run = start.run(place.plan())
    for step in (25, 65):
        wait_for_step(run, step)
        kill_rank(run, 0)
    check(run, undisturbed, attempts=3)


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("which", [0, -1])
def test_a_whole_node_lost(place, undisturbed, site, which):
    """Its slurmd and all that runs on it; Slurm is told, as it would find out by itself after SlurmdTimeout."""
    run = start.run(place.plan())
    wait_for_step(run, 25)
    asked = run.host.call("squeue", "--noheader", "--format=%N", f"--jobs={run.job_id}")
    names = run.host.call("scontrol", "show", "hostnames", asked.strip()).split()
    node = names[which]
    state = sandbox_state.read(site.folder)
    roots = [state.processes[node]]
    on_node = [*roots, *processes.descendants(roots), *processes.marked(SLURMD_NODENAME=node)]
    steps = [pid for pid in processes.descendants([1]) if is_stepd_of(pid, run.job_id, node)]
    for signum in (signal.SIGSTOP, signal.SIGKILL):  # all at once: none lives to tell Slurm of another's end
        for pid in {*on_node, *steps}:
            kill(pid, signum)
    run.host.call("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    try:
        check(run, undisturbed, attempts=2)
    finally:
        daemons.launch(state, node, "slurmd", "-D", "-N", node)
        wait_until(lambda: node_is_back(node, run.host), 60)


def is_stepd_of(pid, job_id, node):
    from pathlib import Path

    try:
        return f"slurmstepd: [{job_id}." in Path(f"/proc/{pid}/cmdline").read_text() and node in Path(
            f"/proc/{pid}/environ"
        ).read_text(errors="replace")
    except OSError:
        return False


def kill(pid, signum):
    import contextlib
    import os

    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signum)


def node_is_back(node, host):
    state = host.call("sinfo", "--noheader", "--format=%T", f"--nodes={node}").strip()
    if state == "down":
        host.call("scontrol", "update", f"nodename={node}", "state=resume")
    return state == "idle"


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_requeued_by_hand(place, undisturbed):
    run = start.run(place.plan())
    wait_for_step(run, 25)
    run.host.call("scontrol", "requeue", run.job_id)
    check(run, undisturbed, attempts=2)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_preempted_five_times_running(place, site):
    """A job of a higher partition takes the nodes whenever the run has got a little further."""
    quiet = start.run(place.plan(steps=400))
    finished(quiet, 600)
    run = start.run(place.plan(steps=400, partition="low", exclusive=True))
    for _ in range(5):
        wait_for_step(run, step_of(run) + 20, seconds=300)
        run.host.call(
            *("sbatch", "--partition=high", "--nodes=4", "--exclusive", "--wait", "--output=/dev/null"),
            "--wrap=sleep 1",
        )
    assert finished(run, 600).state == "COMPLETED", story(run)
    assert len(logs.attempts(run.path)) >= 6
    ended, wanted = final(run, 400), final(quiet, 400)
    assert all((ended[name] == wanted[name]).all() for name in wanted)


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_the_time_limit(place, site):
    """A limit of one minute for what takes longer: warned by Slurm, saved, requeued, until it is done."""
    quiet = start.run(place.plan(steps=1500))
    finished(quiet, 900)
    run = start.run(place.plan(steps=1500, limit="1", signal_lead=40))
    begun = time.monotonic()
    assert finished(run, 900).state == "COMPLETED", story(run)
    if time.monotonic() - begun < 60:
        pytest.skip("it was done within its limit: a faster machine needs more steps")
    assert len(logs.attempts(run.path)) >= 2
    ended, wanted = final(run, 1500), final(quiet, 1500)
    assert all((ended[name] == wanted[name]).all() for name in wanted)
