"""`tokens` shows what a conversation comes to, and transformers' own ids where they differ."""

import json

import pytest
import tokenizer_folders

from megatron_mixtral.jobs import tokens


def told(capsys, *words):
    code = tokens.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_a_sample_has_names_ids_and_what_is_learnt(tmp_path, capsys):
    tokenizer_folders.chatml_nous(tmp_path / "hub")
    code, said, _ = told(capsys, tmp_path / "hub")
    assert code == 0
    assert "answers end with <|im_end|> (32000)" in said
    assert "▁assistant <0x0A>«Par is . <|im_end|>»" in said
    assert "32001 13892 13«3916 278 28723 32000»" in said
    assert "transformers: the same ids" in said
    assert "\x1b" not in said
    assert "\x1b[35;1m<|im_end|>\x1b[0m»" in told(capsys, tmp_path / "hub", "--colour")[1]


def test_other_ids_of_transformers_are_shown(tmp_path, capsys):
    tokenizer_folders.v3_both(tmp_path / "hub")
    _, said, _ = told(capsys, tmp_path / "hub")
    assert "<s> [INST] ▁What" in said
    assert "transformers, by the folder's chat template: other ids from token 2 on" in said
    assert "<s> [INST] ▁ ▁What" in said


def test_rows_of_a_file_are_shown_and_a_bad_one_is_named(tmp_path, capsys):
    tokenizer_folders.v1_both(tmp_path / "hub")
    rows = [{"instruction": "q", "output": "a"}, {"text": "plain"}, {"messages": []}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, said, _ = told(capsys, tmp_path / "hub", tmp_path / "in.jsonl", "--count", 2)
    assert code == 0
    assert "in.jsonl:1: alpaca, " in said
    assert "«<s> ▁plain </s>»" in said
    code, _, wrong = told(capsys, tmp_path / "hub", tmp_path / "in.jsonl", "--count", 3)
    assert code == 2
    assert "in.jsonl:3: messages isn't a non-empty list" in wrong


@pytest.mark.parametrize("missing", ["nothing", "in.jsonl"])
def test_a_folder_without_a_tokenizer_is_named(tmp_path, capsys, missing):
    (tmp_path / "in.jsonl").write_text("{}")
    code, _, wrong = told(capsys, tmp_path / missing)
    assert code != 0
    assert missing in wrong
