"""Words from a table give the ids that SentencePiece gives the whole text, whatever is in it."""

import random

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mixtral.tokenization import word_cache


@pytest.fixture(scope="module")
def model(tokenizer_folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_folder / "tokenizer.model"))


@pytest.fixture(scope="module")
def table(model):
    assert word_cache.serves(model)
    return word_cache.Words(model)


AWKWARD = [
    *("", " ", "  ", "\n", " \n ", "a ", " a", "a  b", "\n\n\na", "a\n b\n", "\t\ta\tb", "x\r\ny", "▁", "▁ "),
    *(
        "▁a ▁▁b",
        "<s>",
        "</s> [INST] hé 你好 [/INST]",
        "ﬁ ¨ x",
        "\u00a0a\u00a0 b",
        "e\u0301",
        "👩\u200d🚀 end ",
        "\x00 a",
        "\u2581\n\u2581",
    ),
]


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_is_encoded_as_a_whole(model, table, text):
    assert table.encode(text) == model.encode(text)
    assert table.encode(text) == model.encode(text), "the second time it comes from the table"


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.one_of(st.sampled_from(" \n\t▁aeThe.,'\"0123<>[]/"), st.characters()), max_size=60))
def test_any_text_is_encoded_as_a_whole(model, table, text):
    try:
        whole = model.encode(text)
    except (UnicodeEncodeError, RuntimeError):
        return  # lone surrogates are no text; which of the two depends on sentencepiece's version
    assert table.encode(text) == whole


def test_long_text_is_encoded_in_stretches(model, monkeypatch):
    monkeypatch.setattr(word_cache, "STRETCH", 7)
    cut, draw = word_cache.Words(model), random.Random(2)
    for _ in range(300):
        text = "".join(draw.choices([*AWKWARD, "word", " ", "  ", "\n"], k=30))
        assert "".join(word_cache._stretches(text)) == text
        assert cut.encode(text) == model.encode(text)


def test_the_table_stays_small(model, monkeypatch):
    monkeypatch.setattr(word_cache, "LIMIT", 50)
    small, draw = word_cache.Words(model), random.Random(1)
    for _ in range(300):
        text = " ".join(str(draw.randrange(10**6)) for _ in range(5))
        assert small.encode(text) == model.encode(text)
        assert len(small._known) <= 50
    long = "x" * 1000
    assert small.encode(long) == model.encode(long)
    assert all(len(key) <= word_cache.LONGEST for key in small._known)


class Crossing:
    """A vocabulary with a piece that goes on over a space: words can't be encoded apart."""

    def __init__(self, model, piece):
        self._model, self._piece = model, piece

    def vocab_size(self):
        return 3

    def id_to_piece(self, index):
        return ["a", self._piece, "▁b"][index]

    def encode(self, text):
        return self._model.encode(text)


@pytest.mark.parametrize("piece", ["of▁the", "a▁", "\n\n", "▁a\n"])
def test_a_vocabulary_that_joins_words_is_left_to_sentencepiece(model, piece):
    assert not word_cache.serves(Crossing(model, piece))
    assert word_cache.serves(Crossing(model, "▁▁a"))
