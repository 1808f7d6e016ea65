"""JSON byte by byte: whatever is an object passes, whatever passes to its end is an object."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mixtral.serve.engine.json_grammar import DEEPEST, MOST_BLANKS, State, Writer, step

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.text(), VALUES, max_size=4)


def read(content):
    """The state after `content`; None where it can't be JSON any more."""
    state = State()
    for byte in content:
        if state is None or state.complete:
            return None
        state = step(state, byte)
    return state


@given(OBJECTS, st.booleans(), st.sampled_from([None, 2, "\t"]))
def test_every_object_passes(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert read(text.encode("utf-8", "replace")).complete


@given(OBJECTS, st.data())
def test_what_passes_is_an_object(value, data):
    """A byte of a real one replaced, left out or put in: the two readers agree."""
    content = bytearray(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
    at = data.draw(st.integers(0, len(content) - 1))
    content[at : at + data.draw(st.integers(0, 1))] = data.draw(st.binary(max_size=1))
    state = read(bytes(content))
    try:
        is_object = isinstance(json.loads(content.decode()), dict)
    except (ValueError, UnicodeDecodeError):
        is_object = False
    assert (state is not None and state.complete) == is_object


@pytest.mark.parametrize(
    "text",
    ["[]", "1", '"a"', "{1:2}", '{"a"}', '{"a":}', '{"a":1,}', '{"a":01}', '{"a":.5}', '{"a":+1}', '{"a":NaN}'],
)
def test_what_only_looks_like_it_does_not_pass(text):
    state = read(text.encode())
    assert state is None or not state.complete


def test_neither_depth_nor_blanks_go_on_for_ever():
    assert read(b'{"a":' + b"[" * (DEEPEST - 1)) is not None
    assert read(b'{"a":' + b"[" * DEEPEST) is None
    assert read(b"{" + b" " * MOST_BLANKS) is not None
    assert read(b"{" + b" " * (MOST_BLANKS + 1)) is None


def test_a_token_may_close_the_object_but_say_no_more():
    tokens = [b"{", b'"a":', b"1}", b"}}", b" {", None, b""]
    end = 5
    writer = Writer(tokens, [end])
    assert [t for t in range(9) if writer.fits(t)] == [0, 4]
    writer.take(0)
    writer.take(1)
    assert [t for t in range(9) if writer.fits(t)] == [0, 2, 4]
    writer.take(4)
    assert [t for t in range(9) if writer.fits(t)] == [1, 3]
    writer.take(3)
    assert [t for t in range(9) if writer.fits(t)] == [end]
    writer.take(end)
