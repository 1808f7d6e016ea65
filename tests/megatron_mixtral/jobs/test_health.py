"""The health check: what it sees of a node by itself, and which node it blames when they don't work together."""

import os
import subprocess
import sys

import pytest
from spawn_ranks import free_port

from megatron_mixtral.jobs import health

CLOCK = """
import sys, time
real = time.time
time.time = lambda: real() + 90
sys.argv = ["health", *sys.argv[1:]]
from megatron_mixtral.jobs import health
sys.exit(health.main())
"""


@pytest.fixture
def check(tmp_path):
    """One process a node, with what is different on some of them; each node's verdict."""
    folder = tmp_path / "health"
    folder.mkdir()
    port = str(free_port())

    def run(nodes: int, **odd: dict) -> list[str]:
        (folder / "nodes").write_text("\n".join(f"gpu{n}" for n in range(nodes)))
        rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(nodes)}
        started = []
        for rank in range(nodes):
            different = odd.get(f"node{rank}", {})
            program = different.get("program", ["-m", "megatron_mixtral.jobs.health"])
            environment = {**os.environ, **rendezvous, "RANK": str(rank), "OMP_NUM_THREADS": "1"}
            argv = [sys.executable, *program, "--folder", str(folder), "--gpus", "0"]
            started.append(
                subprocess.Popen(
                    argv, env=environment | different.get("env", {}), stdout=subprocess.PIPE, text=True
                )
            )
        said = [process.communicate(timeout=100)[0].splitlines() for process in started]
        return [lines[-1].removeprefix("health: ") for lines in said]

    return run


@pytest.mark.soak
def test_a_clock_that_is_wrong_is_found(check):
    verdicts = check(3, node2={"program": ["-c", CLOCK]})
    assert verdicts == ["ok", "ok", "its clock is 90 s ahead"]


@pytest.mark.soak
def test_the_node_that_fails_with_every_neighbour_is_blamed(check):
    """gloo is told an interface that node 1 hasn't got, so that only its connections fail."""
    verdicts = check(3, node1={"env": {"GLOO_SOCKET_IFNAME": "nowhere0"}})
    assert verdicts == ["ok", "an all-reduce with gpu0 and gpu2 fails", "ok"]


def test_memory_that_is_used_up_is_found():
    full = "MemTotal:       536870912 kB\nMemFree: 1 kB\nMemAvailable:   1048576 kB\n"
    assert list(health._memory(full)) == ["main memory: 1.0 of 512 GiB are free"]
    assert list(health._memory(full.replace("1048576", "104857600"))) == []


def test_missing_gpus_speak_against_a_node_where_others_show_theirs(monkeypatch):
    monkeypatch.setattr(health.shutil, "which", lambda _: None)
    assert health._gpu_count(8, 7, 8) == ["7 of 8 GPUs are visible"]
    assert health._gpu_count(8, 8, 8) == []
    assert health._gpu_count(8, 0, 0) == []  # nobody has any: a rehearsal
    monkeypatch.setattr(health.shutil, "which", lambda _: "/usr/bin/nvidia-smi")
    assert health._gpu_count(8, 0, 0) == ["0 of 8 GPUs are visible"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_two_neighbours_meet_once_and_no_node_is_in_two_rounds_at_a_time(count):
    pairs = list(health._ring(list(range(count))))
    assert len(pairs) == len({tuple(sorted(pair)) for pair in pairs}) == (count if count > 2 else 1)
    assert all(sum(rank in pair for pair in pairs) == min(2, count - 1) for rank in range(count))


def test_a_folder_that_cant_be_written_is_found(tmp_path):
    (tmp_path / "gone").touch()
    assert list(health._writable("the run directory", tmp_path / "gone")) == [
        "the run directory can't be written: Not a directory"
    ]
    assert list(health._writable("it", tmp_path)) == []
    assert [path.name for path in tmp_path.iterdir()] == ["gone"]
