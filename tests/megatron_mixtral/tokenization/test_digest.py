"""The digest of a tokenizer changes with all that changes ids, and with nothing else."""

import json

import pytest
import tokenizer_folders

from megatron_mixtral.tokenization import tokenizer


@pytest.fixture
def folder(tmp_path):
    tokenizer_folders.chatml_nous(tmp_path / "hub")
    return tmp_path / "hub"


def digests(folder):
    words = tokenizer.load(folder)
    return [tokenizer.ids_digest(words, rendered=rendered) for rendered in (False, True)]


def change(folder, name, edit):
    known = json.loads((folder / name).read_text())
    edit(known)
    (folder / name).write_text(json.dumps(known))


def swap_merges(known):
    merges = known["model"]["merges"]
    at = merges.index(["▁t", "h"]) if ["▁t", "h"] in merges else merges.index("▁t h")
    merges.append(merges.pop(at))


def space_once(known):
    known |= {"normalizer": None, "pre_tokenizer": tokenizer_folders.METASPACE}


def strip_right(known):
    known["added_tokens"][-1]["rstrip"] = True


@pytest.mark.parametrize(
    ("edit", "text", "talks"),
    [
        (swap_merges, True, True),
        (space_once, True, True),
        (strip_right, False, True),
        (lambda _: None, False, False),
    ],
)
def test_it_changes_with_what_changes_ids(folder, edit, text, talks):
    before = digests(folder)
    change(folder, "tokenizer.json", edit)
    after = digests(folder)
    assert [a != b for a, b in zip(before, after, strict=True)] == [text, talks]


def test_it_changes_with_the_end_token(folder):
    before = digests(folder)
    change(folder, "special_tokens_map.json", lambda known: known.update(eos_token="</s>"))
    assert all(a != b for a, b in zip(before, digests(folder), strict=True))


def test_text_has_one_digest_for_both_files_of_a_vocabulary(tokenizer_folder):
    both = [tokenizer.load(tokenizer_folder / name) for name in ("tokenizer.model", "tokenizer.json")]
    assert len({tokenizer.ids_digest(words, rendered=False) for words in both}) == 1
