"""Rows as people have them: each format gives the conversation it means, and no field is left out silently."""

import csv
import gzip
import json

import pytest
from prepared_data import prepare, stored, write_jsonl

from megatron_mixtral.data import documents, formats
from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat

CALL = {"name": "weather", "arguments": {"city": "Paris"}}


def talk(*turns):
    return [{"role": role, "content": content} for role, content in turns]


ASKED = talk(("user", "q"), ("assistant", "a"))
ROWS = {
    "messages": ({"messages": ASKED, "id": 3}, ASKED),
    "messages in conversations": ({"conversations": ASKED}, ASKED),
    "sharegpt": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ASKED),
    "sharegpt with a system": (
        {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        talk(("system", "s"), ("user", "q"), ("assistant", "a")),
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, ASKED),
    "alpaca with an input": (
        {"instruction": "q", "input": "i", "output": "a"},
        talk(("user", "q\ni"), ASKED_A := ("assistant", "a")),
    ),
    "alpaca with a history": (
        {"instruction": "q", "output": "a", "history": [["x", "y"]], "system": "s"},
        talk(("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "q"), ASKED_A),
    ),
    "prompt": ({"prompt": "q", "completion": "a"}, ASKED),
    "prompt of messages": ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED),
    "openorca": (
        {"system_prompt": "s", "question": "q", "response": "a"},
        talk(("system", "s"), ("user", "q"), ASKED_A),
    ),
    "openorca without a system": ({"system_prompt": "", "question": "q", "response": "a"}, ASKED),
}


@pytest.mark.parametrize("name", ROWS)
def test_each_format_is_recognised_and_means_a_conversation(tmp_path, tokenizer_folder, words, name, capsys):
    row, meant = ROWS[name]
    ((ids, mask),) = stored(prepare(tmp_path, tokenizer_folder, write_jsonl(tmp_path / "in.jsonl", [row])))
    assert (ids, mask) == chat.V1(words).example(meant)
    assert f"rows by format: {name.split()[0]} 1" in capsys.readouterr().out


def test_answers_in_a_prompt_are_not_learnt(words):
    row = {
        "prompt": [*ASKED, {"role": "user", "content": "r"}],
        "completion": [{"role": "assistant", "content": "b"}],
    }
    found = formats.read(row, formats.Fields())
    ids, mask = chat.V1(words).example(found.messages)
    assert [n for n, bit in zip(ids, mask, strict=True) if bit] == [*words.encode("b"), words.eos]


def test_a_weight_of_0_is_heeded(words):
    said = [*ASKED, {"role": "user", "content": "r"}, {"role": "assistant", "content": "b"}]
    for weights in ({"weight": 0}, {"train": False}, {"trainable": False}):
        ids, mask = chat.V1(words).example([said[0], said[1] | weights, *said[2:]])
        assert ids == chat.V1(words).example(said)[0]
        assert [n for n, bit in zip(ids, mask, strict=True) if bit] == [*words.encode("b"), words.eos]


def test_calls_in_sharegpts_words_are_tool_calls():
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "18 C"},
        {"from": "gpt", "value": "a"},
    ]
    found = formats.read({"conversations": turns, "tools": "[]"}, formats.Fields()).messages
    assert [m["role"] for m in found] == ["user", "assistant", "tool", "assistant"]
    assert found[1]["tool_calls"] == [CALL]


def test_token_ids_are_taken_as_they_are(tmp_path, tokenizer_folder):
    rows = [{"input_ids": [1, 5, 2]}, {"input_ids": [1, 5, 2], "labels": [-100, 5, 2]}]
    found = stored(prepare(tmp_path, tokenizer_folder, write_jsonl(tmp_path / "in.jsonl", rows)))
    assert found == [([1, 5, 2], [1, 1, 1]), ([1, 5, 2], [0, 1, 1])]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "q", "output": "a", "images": ["x"]}, "'images' isn't used by the format alpaca"),
        ({"messages": ASKED, "weight": 0}, "'weight' isn't used by the format messages"),
        ({"messages": ASKED, "tools": [{"name": "f"}]}, "Mistral's v1 form has no place for them"),
        ({"messages": [ASKED[0], ASKED[1] | {"tool_calls": [{"function": CALL}]}]}, "tool_calls: Mistral's v1"),
        ({"messages": [ASKED[0], ASKED[1] | {"weight": 0.5}]}, "weight 0.5 isn't 0 or 1"),
        ({"messages": [ASKED[0], ASKED[1] | {"weight": 0}]}, "no answer is to be learnt"),
        (
            {"messages": talk(("user", "q"), ("assistant", None))},
            "isn't an object with a text `content`: it has null",
        ),
        ({"messages": talk(("user", "q"), ("assistant", 42))}, "it is int"),
        ({"messages": talk(("user", "q"), ("assistant", ""))}, "the assistant's content is empty"),
        ({"messages": talk(("system", "s"))}, "must be the user's"),
        ({"conversations": [{"from": "martian", "value": "q"}]}, "from 'martian' isn't one of human, user, gpt"),
        ({"prompt": "q", "completion": "a", "chosen": "x"}, "'chosen' isn't used by the format prompt"),
        ({"input_ids": [1, 2], "labels": [1]}, "'labels' aren't the input_ids"),
    ],
)
def test_what_would_be_left_out_is_an_error(tmp_path, tokenizer_folder, row, reason):
    with pytest.raises(InputError) as error:
        prepare(tmp_path, tokenizer_folder, write_jsonl(tmp_path / "in.jsonl", [row]))
    assert "in.jsonl:1: " in str(error.value)
    assert reason in str(error.value)


def test_keys_that_name_two_of_three_fields_are_an_error_until_the_third_is_ignored(tmp_path, tokenizer_folder):
    rows = [{"instruction": "Translate.", "input": "Good day", "output": "Bonjour"}]
    keys = {"prompt_key": "instruction", "completion_key": "output"}
    file = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(InputError, match="'input' isn't used by the format prompt"):
        prepare(tmp_path, tokenizer_folder, file, **keys)
    assert len(stored(prepare(tmp_path, tokenizer_folder, file, **keys, ignore_fields="input"))) == 1
    assert len(stored(prepare(tmp_path, tokenizer_folder, file, format="alpaca"))) == 1
    with pytest.raises(InputError, match="format: 'odd' isn't one of messages, sharegpt"):
        prepare(tmp_path, tokenizer_folder, file, format="odd")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("block", [3, 1 << 20])
def test_an_array_of_json_is_read_element_by_element(tmp_path, tokenizer_folder, words, monkeypatch, indent, block):
    monkeypatch.setattr(documents, "BLOCK", block)
    texts = [f"text {n} é" for n in range(20)]
    file = tmp_path / "in.json.gz"
    file.write_bytes(gzip.compress(json.dumps([{"text": t} for t in texts], indent=indent).encode()))
    found = stored(prepare(tmp_path, tokenizer_folder, file))
    assert [ids for ids, _ in found] == [[1, *words.encode(t), 2] for t in texts]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[\n{"text": "a"},\n{"text": ""}]', "in.json:3: 'text' is empty"),
        ('[\n{"text": "a"},\n{"text": "b"', "in.json:3: an array of JSON that can't be read"),
        ('[{"text": "a"}] x', "more text after the end of the array"),
    ],
)
def test_what_is_wrong_with_an_array_is_named_by_line(tmp_path, tokenizer_folder, content, reason):
    (tmp_path / "in.json").write_text(content)
    with pytest.raises(InputError, match=reason):
        prepare(tmp_path, tokenizer_folder, tmp_path / "in.json")


def test_a_table_has_a_row_a_document(tmp_path, tokenizer_folder, words):
    with (tmp_path / "in.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("prompt", "completion"), ("q, with\nlines", "a"), ("r", "b")])
    found = stored(prepare(tmp_path, tokenizer_folder, tmp_path / "in.csv"))
    assert found[0] == chat.V1(words).example(talk(("user", "q, with\nlines"), ("assistant", "a")))
    (tmp_path / "in.csv").write_text("text\na\nb,c\n")
    with pytest.raises(InputError, match=r"in\.csv:3: another number of columns"):
        prepare(tmp_path, tokenizer_folder, tmp_path / "in.csv")


def test_parquet_is_read_or_its_library_is_named(tmp_path, tokenizer_folder, words):
    file = tmp_path / "train.parquet"
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        file.write_bytes(b"PAR1")
        with pytest.raises(InputError, match=r"train\.parquet: reading parquet needs `pip install pyarrow`"):
            prepare(tmp_path, tokenizer_folder, file)
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": ASKED}]), file)
    assert stored(prepare(tmp_path, tokenizer_folder, file)) == [chat.V1(words).example(ASKED)]


def test_of_a_data_sets_folder_its_card_and_other_splits_are_left_out(tmp_path, tokenizer_folder, words, capsys):
    folder = tmp_path / "ds"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# My chats\n")
    (folder / "dataset_infos.json").write_text('{\n "default": {}\n}')
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation"):
        write_jsonl(folder / "data" / f"{name}.jsonl", [{"text": name}])
    found = stored(prepare(tmp_path, tokenizer_folder, folder))
    assert [ids for ids, _ in found] == [[1, *words.encode("train-00000-of-00001"), 2]]
    told = capsys.readouterr().out
    assert all(
        name in told for name in ("README.md", "dataset_infos.json", "data/test-00000", "data/validation.jsonl")
    )
    for file in (folder / "data").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="in this folder, cards apart"):
        prepare(tmp_path, tokenizer_folder, folder)


def test_control_tokens_written_out_in_text_are_told_once(tmp_path, tokenizer_folder, capsys):
    rows = [{"text": "<s>[INST] What? [/INST] Four.</s>"}, {"text": "plain"}, {"text": "<|im_start|>user\nHi"}]
    prepare(tmp_path, tokenizer_folder, write_jsonl(tmp_path / "in.jsonl", rows))
    assert capsys.readouterr().out.count("note: 2 documents have control tokens written out") == 1
