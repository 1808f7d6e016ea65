"""What a reader of a stream sees: joined pieces are the decoded whole, and stop strings cut exactly."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixtral.serve.http.detokenizer import Detokenizer, StopStrings
from megatron_mixtral.tokenization import tokenizer
from megatron_mixtral.tokenization.token_text import token_bytes, token_text

TEXTS = ["Hello  world\n\nnew — ünïcode 😀 日本語 ", " leading", "x" * 50, "a\tb", "1️⃣👩‍👩‍👧", ""]


@pytest.fixture(scope="module")
def words(tokenizer_folder):
    return tokenizer.load(tokenizer_folder / "tokenizer.model")


def streamed(words, context, ids):
    detokenizer = Detokenizer(words, context)
    return "".join([*(detokenizer.push(i) for i in ids), detokenizer.flush()])


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_at_every_cut_between_prompt_and_answer(words, text):
    ids = words.encode(text)
    assert streamed(words, [], ids) == text
    for cut in range(1, len(ids)):
        before = words.decode(ids[:cut])
        if not before.endswith("\ufffd"):  # a prompt that ends within a character has no text of its own
            assert before + streamed(words, ids[:cut], ids[cut:]) == text


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 258), st.integers(0, 31999), st.integers(32000, 40000)), max_size=40))
def test_any_ids_stream_to_what_decodes_at_once(words, ids):
    known = [i for i in ids if i < words.vocab_size and i not in words.silent]
    assert streamed(words, [], ids) == words.decode(known)


def test_half_a_character_is_held_back(words):
    detokenizer = Detokenizer(words, [])
    pieces = [detokenizer.push(3 + byte) for byte in "😀".encode()]  # byte tokens begin at id 3
    assert pieces == ["", "", "", "😀"]


def test_the_first_word_of_a_chat_answer_has_no_leading_space_but_a_continuation_has(words):
    hello = words.encode("Hello")
    assert streamed(words, [], hello) == "Hello"
    assert streamed(words, words.encode("Say"), hello) == " Hello"


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(st.text("abc", max_size=3), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_is_cut_at_the_earliest_completed_stop_string(pieces, stops):
    cut, shown, text = StopStrings(stops), "", ""
    for piece in pieces:
        text += piece
        shown += cut.push(piece)
        if cut.hit:
            break
    hits = [text.index(stop) for stop in stops if stop in text]
    if hits:
        assert shown == text[: min(hits)]
        assert cut.hit
    else:
        assert shown + cut.flush() == text
        assert cut.hit is None


def test_a_piece_is_shown_as_soon_as_no_stop_string_can_begin_in_it():
    cut = StopStrings(["STOP"])
    assert [cut.push(piece) for piece in ("hi S", "T", "AND ", "STO", "P now")] == ["hi ", "", "STAND ", "", ""]
    assert cut.hit == "STOP"


def test_single_tokens_are_named_as_the_openai_api_names_them(words):
    assert [token_text(words, i) for i in (1, 22557, 3 + 0xE2, 3 + 0x41)] == ["<s>", " Hello", "bytes:\\xe2", "A"]
    assert token_bytes(words, 3 + 0xE2) == [0xE2]
    assert bytes(token_bytes(words, 22557)) == b" Hello"
