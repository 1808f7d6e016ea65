"""Every kind of folder x thirty conversations x prepare, serve and chat: the reference's ids, token for token.

The reference is transformers for a folder's own chat template, and mistral-common for Mistral's own forms.
"""

import asyncio
import itertools
import json

import conversations
import mistral_reference
import pytest
import tokenizer_folders
from prepared_data import prepare, stored, write_jsonl
from transformers import AutoTokenizer

from launcher.cli import chat as client
from launcher.runs.servers import Server
from megatron_mixtral.serve.http import requests
from megatron_mixtral.serve.http.bounds import Bounds
from megatron_mixtral.serve.http.schema import ChatBody
from megatron_mixtral.tokenization import chat_template, tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each kind once."""
    folders = {}

    def make(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("kinds") / kind.__name__
            kind(folders[kind])
        return folders[kind]

    return make


def by_transformers(folder):
    known = AutoTokenizer.from_pretrained(folder)

    def ids(talk, tools=None):
        asks = talk[-1]["role"] != "assistant"
        options = {"return_dict": False, "sanitize_control_tokens": True, "tools": tools}
        return known.apply_chat_template(talk, add_generation_prompt=asks, **options)

    return ids


REFERENCES = [
    *((kind, lambda _: mistral_reference.ids) for kind in tokenizer_folders.V1),
    *((kind, lambda _: mistral_reference.v3_ids) for kind in tokenizer_folders.V3),
    *((kind, by_transformers) for kind in tokenizer_folders.TEMPLATES),
]


@pytest.mark.parametrize(("kind", "reference"), REFERENCES, ids=lambda kind: getattr(kind, "__name__", ""))
def test_ids_are_the_references(made, tmp_path, kind, reference):
    folder = made(kind)
    ids, words = reference(folder), tokenizer.load(folder)
    file = write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk} for talk in conversations.ALL])
    prepared = stored(prepare(tmp_path, folder, file))
    for talk, (found, mask) in zip(conversations.ALL, prepared, strict=True):
        assert found == ids(talk), talk
        check_mask(words, found, mask, talk)
    form = chat_template.form(words)
    bounds = Bounds(context=4096, longest=16)
    names = {"name": "m", "created": 0, "bounds": bounds}
    model = requests.ServedModel(tokenizer=words, form=form, vocab_size=words.vocab_size, **names)
    for talk in conversations.ALL:
        question = talk[: max(n for n, turn in enumerate(talk) if turn["role"] == "user") + 1]
        wanted = ids(question)
        assert served(model, {"messages": question}) == wanted, question
        assert served(model, chatted(question)) == wanted, question


def check_mask(words, ids, mask, talk):
    """Learnt are the answers, each with an end token, and nothing else."""
    runs = [[]]
    for index, bit in zip(ids, mask, strict=True):
        if bit:
            runs[-1].append(index)
        if bit and index in words.ends:
            runs.append([])
    assert runs.pop() == [], "the last one has an end token, too"
    answers = [turn["content"] for turn in talk if turn["role"] == "assistant"]
    neighbours = sum(a["role"] == b["role"] == "assistant" for a, b in itertools.pairwise(talk))
    assert len(runs) in (len(answers), len(answers) - neighbours)
    said = "".join(words.decode([index for index in run if index not in words.silent]) for run in runs)
    assert "".join(said.split()) == "".join("".join(answers).replace("▁", " ").split())


def served(model, body):
    return asyncio.run(requests.chat_prompt(ChatBody.model_validate(body), model))


def chatted(messages):
    """What `mixlaunch chat` sends."""
    system = next((m["content"] for m in messages if m["role"] == "system"), None)
    turns = [m for m in messages if m["role"] != "system"]
    return client.Conversation(server=Server(url="http://x"), system=system, turns=turns)._body()


CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
OFFER = {"name": "weather", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": OFFER}]
CALLED = [
    {"role": "user", "content": "Weather in Paris?"},
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": "18 C"},
    {"role": "assistant", "content": "It is 18 degrees."},
]


@pytest.mark.parametrize("kind", tokenizer_folders.V3)
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "Be brief."}]])
def test_tools_are_written_as_mistral_common_does(made, kind, system):
    form = chat_template.form(tokenizer.load(made(kind)))
    for length in (2, 4):
        talk = [*system, *CALLED[:length]]
        ids, mask = form.example(talk, TOOLS)
        assert ids == mistral_reference.v3_ids(talk, TOOLS)
        assert form.example(talk, json.dumps(TOOLS)) == (ids, mask)
    assert form.prompt([*system, *CALLED[:3]], TOOLS) == mistral_reference.v3_ids([*system, *CALLED[:3]], TOOLS)
    assert form.example(CALLED)[1].count(1) == mask.count(1)
    first = next(index for index, bit in zip(*form.example(CALLED), strict=True) if bit)
    assert form._tokenizer.piece(first) == "[TOOL_CALLS]"


def test_a_template_for_tools_is_taken_where_there_are_any(made):
    folder = made(tokenizer_folders.two_templates)
    form, ids = chat_template.form(tokenizer.load(folder)), by_transformers(folder)
    talk = [CALLED[0], {**CALLED[1], "content": "I look."}, *CALLED[2:]]
    assert form.example(talk, TOOLS)[0] == ids(talk, TOOLS)
    with pytest.raises(ValueError, match="doesn't write the assistant's tool_calls"):
        form.example(talk)
    with pytest.raises(ValueError, match="tools: the chat template doesn't write them"):
        chat_template.Template({"default": tokenizer_folders.CHATML}, form._tokenizer, where="").example(
            conversations.PLAIN[0], TOOLS
        )


NOTED = {
    tokenizer_folders.contradictory: [
        "special_tokens_map.json names </s> as eos_token, tokenizer_config.json <|im_end|>",
        "added_tokens.json has <|im_start|> as 32000, tokenizer_config.json <|im_end|>",
        "chat_template.jinja isn't tokenizer_config.json's",
    ],
    tokenizer_folders.chatml_eos_list: [],
    tokenizer_folders.chatml_nous: [],
    tokenizer_folders.v3_both: [],
}


@pytest.mark.parametrize("kind", NOTED)
def test_files_that_contradict_each_other_are_told(made, kind, tmp_path, capsys):
    notes = tokenizer.load(made(kind)).notes
    for wanted in NOTED[kind]:
        assert any(note.startswith(wanted) for note in notes), notes
    if not NOTED[kind]:
        assert not notes
    prepare(tmp_path, made(kind), write_jsonl(tmp_path / "in.jsonl", [{"messages": conversations.PLAIN[0]}]))
    said = capsys.readouterr().out
    assert all(f"note: {note}" in said for note in notes)
