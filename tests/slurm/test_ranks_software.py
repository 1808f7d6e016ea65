"""What stands between srun and a rank's Python, on the real Slurm: containers and NUMA binding get what was meant.

Container runtimes and numactl need the real thing to do anything; here programs of their names tell how they were
called and run the rest, so what is tried is our half: every word, in every rank.
"""

import re
from pathlib import Path

import pytest
from hostile_texts import CANARY, CARRIED

from launcher.cluster.sections import Binding, Container
from launcher.runs import logs, record
from launcher.submit import start

# Tells its arguments, then runs what follows the word that ends its options.
PROGRAM = """#!/bin/bash
name=$(basename "$0")
printf '%s\\0' "$@" >"$MIXLAUNCH_RUN/$name.${RANK:-$SLURM_PROCID}"
while [ $# -gt 0 ] && [ "$1" != bash ] && [ "$1" != "$PYTHON" ]; do shift; done
exec "$@"
"""


@pytest.fixture
def programs(tmp_path):
    """A PATH on which these programs come first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("apptainer", "docker", "numactl"):
        (folder / name).write_text(PROGRAM)
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def words(run: record.Run, program: str, rank: int) -> list[str]:
    return (run.path / f"{program}.{rank}").read_text().split("\0")[:-1]


MOUNTED = [value for value in CARRIED if not set(value) & set(":,") and len(value) < 200]


@pytest.mark.parametrize(("runtime", "option"), [("apptainer", "--bind"), ("docker", "--volume")])
def test_images_and_mounts_arrive_as_they_were_written(runtime, option, plan, stub, programs, finish, tmp_path):
    mounts = tuple(f"{tmp_path}/in/{value}:/mnt/{value}:ro" for value in MOUNTED)
    image = 'docker://it\'s $(touch canary) `touch canary`; "x" %j'
    container = Container(runtime=runtime, image=image, mounts=mounts)
    python = stub('printf %s "$TOKEN" >"$MIXLAUNCH_RUN/token.$RANK"')
    environment = {"PATH": programs, "TOKEN": "it's $(touch canary)"}
    run = start.run(plan(python, container=container, environment=environment))
    assert finish(run).state == "COMPLETED"
    for rank in range(4):
        told = words(run, runtime, rank)
        assert [told[n + 1] for n, word in enumerate(told) if word == option][: len(mounts)] == list(mounts)
        assert told[-3:] == [image, "bash", "-s"]
        assert f"{run.path}:{run.path}" in told or f"{run.path.parent}:{run.path.parent}" in told
        assert not any("touch canary" in word for word in told if word.startswith("TOKEN"))  # by name, or by itself
        assert (run.path / f"token.{rank}").read_text() == environment["TOKEN"]
    home = {
        "apptainer": "--no-home" in told,
        "docker": not any(str(Path.home()) == w.partition(":")[0] for w in told),
    }
    assert home[runtime]
    assert not list(tmp_path.rglob(CANARY))


def test_each_rank_keeps_to_its_gpu_s_numa_node(plan, stub, programs, finish):
    python = stub('echo "$RANK" >"$MIXLAUNCH_RUN/ran.$RANK"')
    environment = {"PATH": programs, "PYTHON": python}
    binding = Binding(cpu="none", memory="none", numa=(3, 1))
    run = start.run(plan(python, binding=binding, environment=environment))
    assert finish(run).state == "COMPLETED"
    for rank in range(4):
        node = (3, 1)[rank % 2]  # two ranks a node
        assert words(run, "numactl", rank)[:3] == [f"--cpunodebind={node}", f"--membind={node}", python]
        assert (run.path / f"ran.{rank}").exists()


def test_without_numactl_binding_is_a_mistake_that_is_told_once(plan, stub, finish, tmp_path):
    (tmp_path / "bin").mkdir()
    for name in (
        "srun",
        "scontrol",
        "mkdir",
        "cat",
        "bash",
        "uname",
        "getent",
        "grep",
        "cut",
        "basename",
        "dirname",
    ):
        path = next(p for p in (Path("/usr/bin", name), Path("/bin", name)) if p.exists())
        (tmp_path / "bin" / name).symlink_to(path)
    environment = {"PATH": str(tmp_path / "bin")}
    run = start.run(plan(stub("true"), binding=Binding(numa=(0, 1)), environment=environment))
    assert finish(run).state == "FAILED"
    batch = logs.path(run.path, 0, logs.BATCH).read_text()
    assert "a mistake in what was asked for, so not retried" in batch
    # Of the ranks that leave later each may be ended before it says why; the first one's log always tells.
    first = int(re.search(r"rank (\d) on \S+ was the first to leave, with 2", batch)[1])
    assert "binding.numa needs numactl where the ranks run" in logs.path(run.path, 0, first).read_text()
    assert not (run.path / "logs" / "attempt_1").exists()


def test_srun_takes_every_binding(plan, stub, finish):
    binding = Binding(cpu="cores", memory="local", gpu="none", distribution="block:block")
    run = start.run(plan(stub("true"), binding=binding))
    assert finish(run).state == "COMPLETED"


def test_a_template_of_one_s_own_runs(plan, stub, finish, tmp_path):
    (tmp_path / "environment.j2").write_text(
        'module() { export LOADED=$1; }\nmodule {{ "it\'s cuda/12" | sh }}\n'
        "{% include 'stock/environment.sh.j2' %}"
    )
    run = start.run(
        plan(
            stub('printf %s "$LOADED" >"$MIXLAUNCH_RUN/loaded.$RANK"'),
            templates={"environment": str(tmp_path / "environment.j2")},
        )
    )
    assert finish(run).state == "COMPLETED"
    assert {(run.path / f"loaded.{rank}").read_text() for rank in range(4)} == {"it's cuda/12"}
