"""`convert` killed (SIGKILL) at random points, then run again: the same bytes, and no work done twice."""

import errno
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import hub_folders
import pytest
import run_job
from conversion import contents, run

from megatron_mixtral import errors
from megatron_mixtral.jobs import convert
from megatron_mixtral.spec import rundir
from megatron_mixtral.spec.jobs import ConvertConfig
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.weights import shared_work
from megatron_mixtral.weights.copying import Copier

KILLS = 20


@pytest.fixture(scope="module")
def fresh_processes():
    """Processes that have everything loaded already, so that a kill falls into the conversion, not into imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_mixtral.jobs.convert"])
    with pytest.MonkeyPatch.context() as patched:
        for name in ("__file__", "__spec__"):  # or each of them would import pytest first
            patched.setattr(sys.modules["__main__"], name, None, raising=False)
        yield context


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    hub_folders.write(folder / "hub", shards=2, hidden_size=64, intermediate_size=1024, num_local_experts=8)
    run(folder / "hub", folder / "megatron", folder)
    return folder


def finished(partial: Path) -> dict[str, int]:
    """Name -> time of change of each weights file under its final name."""
    kinds = ("*.distcp", "*.safetensors", "model_optim_rng.pt")
    found = [path for kind in kinds for path in partial.rglob(kind)]
    return {str(path.relative_to(partial)): path.stat().st_mtime_ns for path in found}


def written(partial: Path) -> int:
    """Bytes in the folder so far, files that are half-way included."""
    try:
        return sum(p.stat().st_size for p in partial.rglob("*") if p.is_file())
    except FileNotFoundError:  # a file that got its name between the two
        return 0


@pytest.fixture
def in_memory():
    """A folder whose disk is memory where there is such: what a kill leaves behind is the same on either."""
    with tempfile.TemporaryDirectory(dir=next(filter(os.path.isdir, ("/dev/shm", "/tmp")))) as folder:
        yield Path(folder)


@pytest.mark.parametrize(("name", "to"), [("hub", "megatron"), ("megatron", "hf"), ("hub", "legacy")])
def test_killed_at_random_points_each_rerun_ends_as_if_undisturbed(fresh_processes, source, in_memory, name, to):
    tmp_path, way = in_memory, {"to": to, "max_shard_gb": 0.001}
    if to == "legacy":
        way = {"format": "legacy", "layout": Layout(expert=8)}

    def start(output):
        config = ConvertConfig(source=str(source / name), output=str(output), **way)
        process = fresh_processes.Process(target=convert.run, args=(config, tmp_path))
        process.start()
        return process

    def undisturbed(output):
        process = start(output)
        process.join(60)
        assert process.exitcode == 0

    undisturbed(tmp_path / "whole")
    expected, pick, went_on = contents(tmp_path / "whole"), random.Random(4), 0
    size = sum(map(len, expected.values()))
    for kill in range(KILLS):
        output, partial = tmp_path / f"out{kill}", tmp_path / f"out{kill}.partial"
        process, enough = start(output), pick.uniform(0, 1.0) * size
        while process.is_alive() and written(partial) < enough:
            time.sleep(0.0005)
        time.sleep(pick.uniform(0, 0.003))
        process.kill()
        process.join()
        done = finished(partial)
        went_on += bool(done)
        assert output.exists() != partial.exists() or not done  # never both, never a half-made one under the name
        undisturbed(output)
        assert contents(output) == expected
        kept = finished(output)
        again = [name for name in done if kept[name] != done[name]]
        assert len(again) <= 1  # at most the one that had its name already and no record yet
        shutil.rmtree(output)
    assert went_on >= KILLS // 4, f"only {went_on} of {KILLS} kills fell into the writing"


def test_killed_before_the_plan_was_written_it_goes_on(source, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shared_work, "replace_text", killed)
        with pytest.raises(KeyboardInterrupt):
            run(source / "hub", tmp_path / "out", tmp_path)
    assert (tmp_path / "out.partial" / "release").exists()
    run(source / "hub", tmp_path / "out", tmp_path)
    assert contents(tmp_path / "out") == contents(source / "megatron")


def test_a_rank_killed_ends_the_others_and_the_next_attempt_finishes(source, tmp_path, monkeypatch):
    config = {"source": str(source / "hub"), "output": str(tmp_path / "out")}
    with run_job.Job("convert", config, tmp_path / "run", ranks=2) as job:
        while not (tmp_path / "out.partial").exists():
            time.sleep(0.01)
        job.processes[1].kill()
        time.sleep(1.0)
        # Rank 0 waits for what rank 1 didn't write; srun and the local loop end it, as this does.
        ended = [p.poll() for p in job.processes]
    assert not (tmp_path / "out").exists() or ended[0] == 0
    run_job.run("convert", config, tmp_path / "run", ranks=2)
    assert (tmp_path / "out" / "release" / rundir.MARKER).exists()
    run(source / "hub", tmp_path / "alone", tmp_path)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_a_process_that_waits_for_a_dead_one_gives_up(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_work, "STALL", 0.5)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(errors.JobError, match=r"no other process wrote anything for .* s; __\d+_0.distcp is"):
        run(source / "hub", tmp_path / "out", tmp_path)
    assert not (tmp_path / "out").exists()


def test_the_same_conversion_twice_at_once_is_refused(source, tmp_path, monkeypatch):
    output = tmp_path / "out"
    seen = {}

    def second(self, unit, descriptor):
        try:
            run(source / "hub", output, tmp_path)
        except Exception as error:
            seen["error"] = error
        monkeypatch.undo()
        return self.write(unit, descriptor)

    monkeypatch.setattr(Copier, "write", second)
    run(source / "hub", output, tmp_path)
    assert "another process is writing it" in str(seen["error"])
    assert contents(output).keys() == contents(source / "megatron").keys()


def test_a_file_system_without_locks_will_do(source, tmp_path, monkeypatch):
    def unlocked(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(shared_work.fcntl, "flock", unlocked)
    run(source / "hub", tmp_path / "out", tmp_path)
    assert contents(tmp_path / "out") == contents(source / "megatron")


def test_a_process_waits_as_long_as_another_one_writes(source, tmp_path, monkeypatch):
    """Rank 1 has done its part; rank 0 is still at a check that writes nothing but a sign of life."""
    monkeypatch.setattr(shared_work, "STALL", 0.3)
    made = shared_work.Work(tmp_path / "out", {})
    made.records.mkdir(parents=True)

    def publish():
        with made.alive():
            time.sleep(1.5)
        made.publish()

    threading.Thread(target=publish).start()
    made.wait_published(Path("."), int)
    with pytest.raises(errors.JobError, match=r"rank 0 hasn't completed it"):
        made.wait_published(Path("nowhere"), int)
