"""Hours of work leave nothing behind: no error, no memory, no open file, no thread. CI has patience for seconds."""

import pytest
import small_server
import soak


def check(found, *, growth):
    assert found.errors == []
    assert found.answered > 0.6 * found.capacity * found.seconds
    assert found.left > 0
    assert found.growth < growth, found.memory
    assert max(found.descriptors[-3:]) <= max(found.descriptors[:3]) + 20, (
        found.descriptors
    )  # clients stay connected
    assert found.threads[-1] <= max(found.threads[:3]), found.threads


@pytest.mark.alone
def test_12_seconds_at_80_percent_leave_nothing_behind(served_model, tmp_path):
    with small_server.server(tmp_path, served_model[1]) as running:
        check(soak.soak(running, seconds=12, probe_seconds=3), growth=20)
        quiet(running)


@pytest.mark.soak
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", [{}, {"pipeline": 2}], ids=["PP1", "PP2"])
def test_15_minutes_at_80_percent_leave_nothing_behind(served_model, tmp_path, layout):
    ranks = 2 if layout else 1
    with small_server.server(tmp_path, served_model[1], ranks=ranks, layout=layout) as running:
        check(soak.soak(running, seconds=900, probe_seconds=20), growth=20)
        quiet(running)


def quiet(running):
    """Nothing is left of the crowd."""
    running.until(lambda: running.metric("requests_running") == running.metric("requests_queued") == 0, 10)
    running.until(lambda: running.metric("kv_cache_used_ratio") == 0, 10)
    assert running.stop() == [0] * len(running.job.processes)
