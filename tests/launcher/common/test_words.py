"""Numbers, times and names as people read them."""

import datetime

import pytest

from launcher.common import words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(-1, "0s"), (40, "40s"), (725, "12m"), (4800, "1h20"), (39600, "11h"), (259200, "3d")],
)
def test_a_duration_has_the_parts_that_matter(seconds, said):
    assert words.duration(seconds) == said


def test_a_moment_of_today_has_no_date():
    today = datetime.date.today()
    assert words.moment(f"{today}T03:04:05") == "03:04"
    assert words.moment("2026-01-02T03:04:05") == "Fri 02 Jan 03:04"
    assert words.moment("Unknown") == "Unknown"


def test_a_code_above_128_is_a_signal_if_there_is_one():
    assert [words.code_in_words(code) for code in (1, 137, 128, 250)] == [
        *("exit 1", "exit 137, SIGKILL", "exit 128", "exit 250"),
    ]


def test_counts_are_rounded():
    assert [words.count(number) for number in (7, 12_300, 4.5e9)] == ["7", "12.3k", "4.5G"]
    assert [words.plural(number, "node") for number in (0, 1, 2)] == ["0 nodes", "1 node", "2 nodes"]


def test_the_name_that_was_probably_meant_comes_first():
    assert words.choices("gpus", ["cpu", "gpu"]) == "did you mean 'gpu'? There are: cpu, gpu"
    assert words.choices("x", ["cpu", "gpu"]) == "there are: cpu, gpu"
    assert words.choices("x", []) == "there are: none"
    assert words.nearest("serve-1", ["serve-2", "train", "serve-11"], most=2) == ["serve-11", "serve-2"]
