"""The launcher of multi-process tests itself: results, failures and hangs."""

import os
import time

import pytest
from spawn_ranks import RanksFailed, ranks


def _place(word):
    return word, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def _fail_on_one():
    if os.environ["RANK"] == "1":
        raise ValueError("the reason")
    time.sleep(60)


def _hang():
    time.sleep(60)


def test_results_come_in_rank_order():
    assert ranks(3, _place, "here") == [("here", rank, 3) for rank in range(3)]


def test_one_failing_rank_ends_all_and_shows_why():
    begun = time.monotonic()
    with pytest.raises(RanksFailed, match="rank 1 ended with 1") as caught:
        ranks(2, _fail_on_one)
    assert "ValueError: the reason" in str(caught.value)
    assert time.monotonic() - begun < 20


def test_a_hang_shows_its_stack():
    with pytest.raises(RanksFailed, match="_hang"):
        ranks(1, _hang, timeout=6)  # it has to get there first, on a busy machine
