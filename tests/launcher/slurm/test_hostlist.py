"""Slurm's short form of many hosts: taken apart as Slurm does it, put together again, refused when it is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.errors import UsageError
from launcher.slurm import hostlist


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("gpu7", ["gpu7"]),
        ("gpu[1-3]", ["gpu1", "gpu2", "gpu3"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("a[1,3-4],b,c[7]-ib", ["a1", "a3", "a4", "b", "c7-ib"]),
        ("a, b ,a", ["a", "b"]),
        ("", []),
        ("rack[0-1]_blade[0-1]", ["rack0_blade0", "rack0_blade1", "rack1_blade0", "rack1_blade1"]),
        ("c[301,303]-[001-002]a[7]", ["c301-001a7", "c301-002a7", "c303-001a7", "c303-002a7"]),
    ],
)
def test_a_list_is_taken_apart(text, names):
    assert hostlist.expand(text) == names


@pytest.mark.parametrize(
    "text",
    [
        "gpu[3-1]",
        "gpu[a-b]",
        "gpu[1",
        "gpu[1-9999999]",
        "a;b",
        "$(x)",
        "-x",
        "a b",
        "é",
        "a\nb",
        "[1-2][1-2]",
        "r[1-2][",
        "r[0-1]_b[2-1]",
    ],
)
def test_what_is_no_list_is_refused(text):
    with pytest.raises(UsageError, match=r"isn't"):
        hostlist.expand(text)


def test_two_dimensions_have_a_bound():
    with pytest.raises(UsageError, match="more than"):
        hostlist.expand("a[0-9999]-[0-9999]")


def test_it_is_put_together_short():
    assert hostlist.compress(["gpu03", "gpu01", "gpu02", "login", "gpu10", "a7"]) == "a7,gpu[01-03,10],login"


@given(st.lists(st.from_regex(r"[a-z]{1,3}-?[0-9]{0,4}", fullmatch=True).filter(lambda n: n[-1] != "-")))
def test_together_and_apart_is_the_same(names):
    assert set(hostlist.expand(hostlist.compress(names))) == set(names)


def test_numbers_are_put_together():
    assert hostlist.spans([3, 0, 1, 2, 7]) == "0-3,7"
    assert hostlist.spans([]) == ""
