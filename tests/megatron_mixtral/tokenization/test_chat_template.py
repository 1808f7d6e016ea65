"""Chat templates: token for token what transformers makes of them; learnt are the assistant's words alone."""

import json

import pytest
from prepared_data import TALK, prepare, stored, write_jsonl
from transformers import AutoTokenizer

from megatron_mixtral.data import loader
from megatron_mixtral.errors import InputError
from megatron_mixtral.tokenization import chat, chat_template, tokenizer
from megatron_mixtral.tokenization.chat_template import Template

# Turns between the tokenizer's own control tokens, with a prompt's beginning of the assistant's.
ROUNDS = (
    "{% for message in messages %}{{ bos_token + message['role'] + '\\n' }}"
    "{{ message['content'] | trim + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant\\n' }}{% endif %}"
)
# No control token but at an answer's end.
PLAIN = (
    "{% for message in messages %}{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}"
    "{% else %}{{ message.role | upper }}: {{ message.content }}\nBOT:{% endif %}{% endfor %}"
)
MARKED = (
    "{%- for message in messages %}{% if message.role == 'assistant' %}"
    "A:{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}Q: {{ message.content }}\n{% endif %}{% endfor %}"
)
AWKWARD = [
    {"role": "user", "content": "  say </s> and <s>user\n [INST] é你好🎉 "},
    {"role": "assistant", "content": "</s>assistant\n<s>"},
    {"role": "user", "content": "▁ and\r\n\t?"},
    {"role": "assistant", "content": "Yes."},
]


def written(source, words, talk):
    return template(source, words).example(talk)


def template(source, words):
    return Template({"default": source}, words, where="x")


@pytest.mark.parametrize("source", [ROUNDS, PLAIN, chat_template.CHAT_TEMPLATE])
def test_ids_are_those_of_transformers(words, tokenizer_folder, source):
    reference = AutoTokenizer.from_pretrained(tokenizer_folder)
    talk = TALK[1:] if source == chat_template.CHAT_TEMPLATE else TALK
    wanted = reference.apply_chat_template(talk, chat_template=source, return_dict=False)
    assert written(source, words, talk)[0] == wanted
    asked = template(source, words).prompt(talk[:-1])
    prompt = {"chat_template": source, "return_dict": False, "add_generation_prompt": True}
    assert asked == reference.apply_chat_template(talk[:-1], **prompt)
    assert asked == wanted[: len(asked)]


@pytest.mark.parametrize("source", [ROUNDS, PLAIN, MARKED])
@pytest.mark.parametrize("talk", [TALK, AWKWARD])
def test_exactly_the_answers_are_learnt_each_with_its_end(words, source, talk):
    ids, mask = written(source, words, talk)
    learnt, answers = [], [m["content"] for m in talk if m["role"] == "assistant"]
    for index, bit, before in zip(ids, mask, [0, *mask], strict=False):
        if bit:
            learnt += [[]] * (not before or learnt[-1][-1] == words.eos)
            learnt[-1] = [*learnt[-1], index]
    assert [words.decode(part).strip() for part in learnt] == [answer.strip() for answer in answers]
    assert [part[-1] for part in learnt] == [words.eos] * len(answers)
    assert ids.count(words.eos) == (len(talk) if source == ROUNDS else len(answers))
    assert ids.count(words.bos) == (len(talk) if source == ROUNDS else 0)


def test_which_form_is_taken(words, tokenizer_folder, tmp_path):
    assert isinstance(chat_template.form(words), chat.V1)  # the folder's own template writes [INST]
    (tmp_path / "chat_template.jinja").write_text(ROUNDS)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    other = tokenizer.load(tmp_path)
    assert chat_template.form(other).source == ROUNDS
    assert isinstance(chat_template.form(other, "mistral"), chat.V1)
    assert chat_template.form(words, str(tmp_path / "chat_template.jinja")).source == ROUNDS


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ messages[-1].content }}{{ eos_token }}", "otherwise when more follows"),
        (ROUNDS.replace("+ eos_token", ""), "doesn't end it with </s>"),
        ("{{ raise_exception('only short talks') }}", "only short talks"),
        ("{{ messages | nothing }}", None),
        ("{{ ''.__class__.__mro__ }}{{ messages[0].content.x.y }}", "chat template"),
        ("{% for x in %}", None),
    ],
)
def test_what_a_template_cannot_do_is_named(tmp_path, tokenizer_folder, source, reason):
    (tmp_path / "own.jinja").write_text(source)
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": TALK}])
    with pytest.raises(InputError) as error:
        prepare(tmp_path, tokenizer_folder, file, chat_template=str(tmp_path / "own.jinja"))
    assert (reason or f"{tmp_path}/own.jinja: ") in str(error.value)


def test_prepare_writes_by_a_template_and_says_so(tmp_path, tokenizer_folder, words):
    (tmp_path / "own.jinja").write_text(ROUNDS)
    file = write_jsonl(tmp_path / "in.jsonl", [{"messages": TALK}, {"prompt": "q", "completion": "a"}])
    prefix = prepare(tmp_path, tokenizer_folder, file, chat_template=str(tmp_path / "own.jinja"), workers=2)
    assert stored(prefix)[0] == written(ROUNDS, words, TALK)
    assert json.loads((tmp_path / "out.json").read_text())["chat_template"] == ROUNDS
    prepare(tmp_path, tokenizer_folder, file)
    assert stored(prefix)[0] == chat.V1(words).example(TALK)


def test_the_form_goes_with_the_weights_where_theirs_is_another(tokenizer_folder, tmp_path):
    def assets(form, source):
        corpus = loader.Corpus(
            train=None, validation=None, identity={}, masked=True, notes=(), forms=frozenset({form})
        )
        return {name: text.decode() for name, text in corpus.assets(source).items()}

    (tmp_path / "tokenizer.model").write_bytes((tokenizer_folder / "tokenizer.model").read_bytes())
    assert assets(ROUNDS, tokenizer_folder) == {"chat_template.jinja": ROUNDS}
    assert assets(None, tokenizer_folder) == assets(None, tmp_path) == {}
    (tmp_path / "chat_template.jinja").write_text(ROUNDS)
    assert assets(ROUNDS, tmp_path) == {}
    assert isinstance(chat_template.form(tokenizer.load(tmp_path)), Template)
    (tmp_path / "chat_template.jinja").write_text(assets(None, tmp_path)["chat_template.jinja"])
    assert isinstance(chat_template.form(tokenizer.load(tmp_path)), chat.V1)
