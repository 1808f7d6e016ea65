"""A rank that stops making progress ends the job, with the stacks of all and the name of the slow one."""

import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import run_job
from finetunes import PLAIN
from spawn_ranks import RanksFailed, ranks

from megatron_mixtral.distributed import watchdog


def raw_config(world):
    quick = {"steps": 500, "setup_timeout": 60, "step_timeout": 3}
    return {**PLAIN, "model": str(world), "data": str(world / "data"), "layout": {"pipeline": 2}} | quick


@pytest.mark.soak
def test_a_rank_that_is_stopped_dead_is_named_by_the_others(world, tmp_path):
    with run_job.Job("finetune", raw_config(world), tmp_path / "run", ranks=2) as job:
        job.wait_for("step", step=3)
        job.signal(1, signal.SIGSTOP)
        begun = time.monotonic()
        while job.processes[0].poll() is None:
            assert time.monotonic() - begun < 60
            time.sleep(0.1)
        assert job.processes[0].returncode == 1
    said = job.outputs[0].read_text()
    assert "takes longer than 3 s; stacks follow" in said
    assert "most recent call first" in said
    assert "slow: rank 1, which reports nothing; 1 of 2 ranks wait for others" in said


def test_where_a_save_is_stuck_is_told_of_the_thread_that_saves():
    over = threading.Event()

    def stuck_in_a_save():
        over.wait()

    with ThreadPoolExecutor(1, thread_name_prefix="save") as saver:
        written = saver.submit(stuck_in_a_save)
        main = threading.Thread(target=written.result)
        main.start()
        try:
            time.sleep(0.1)
            assert watchdog.whereabouts(watchdog.at_work(main.ident))["at"].endswith("stuck_in_a_save")
        finally:
            over.set()
            main.join()


def get_stuck(raw, folder):
    """Rank 1 sleeps in its data at step 3, as on a file system that doesn't answer."""
    import torch.distributed as dist

    from megatron_mixtral.data import loader
    from megatron_mixtral.spec import checks, jobs
    from megatron_mixtral.training import loop

    take = loader.Feed.take

    def slow_take(self, first, **more):
        if dist.get_rank() == 1 and first >= 2 * raw["global_batch"]:
            time.sleep(1000)
        return take(self, first, **more)

    loader.Feed.take = slow_take
    loop.train(checks.parse(jobs.FinetuneConfig, raw, where="config"), Path(folder))


def test_every_rank_shows_its_stacks_and_the_slow_one_is_named(world, tmp_path):
    with pytest.raises(RanksFailed) as failed:
        ranks(2, get_stuck, raw_config(world), str(tmp_path), timeout=60)
    _, first, second = str(failed.value).split("--- rank ")
    assert "in slow_take" in second
    for said in (first, second):
        assert "most recent call first" in said
        assert "slow: rank 1 in step 3 at test_watchdog.py" in said
        assert "slow_take; 1 of 2 ranks wait for others" in said
