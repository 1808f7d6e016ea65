"""`PUT /api` as Megatron's `text_generation_cli.py` calls it: every setting honoured, every mistake a 400."""

import pytest

from megatron_mixtral.tokenization import tokenizer

PROMPTS = ["The quick brown fox", "Once"]


@pytest.fixture(scope="module")
def client(plain_server):
    with plain_server.client() as made:
        yield made


@pytest.fixture(scope="module")
def words(served_model):
    return tokenizer.load(served_model[0])


def put(client, **body):
    reply = client.put("/api", json={"prompts": PROMPTS, "tokens_to_generate": 8, "top_k": 1, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def test_texts_segments_tokens_and_logprobs_fit_together(client, words):
    reply = put(client, logprobs=True, top_n_logprobs=2)
    assert set(reply) == {"text", "segments", "tokens", "logprobs", "top_n_logprobs"}
    for prompt, text, segments, tokens, logprobs, tops in zip(PROMPTS, *reply.values(), strict=True):
        assert text.startswith(prompt)
        assert len(text) > len(prompt)
        assert "".join(segments) == text
        assert len(segments) == len(tokens) == len(logprobs) + 1 == len(tops) + 1
        assert tokens[0] == words.bos
        assert all(max(top.values()) >= logprob - 1e-6 for top, logprob in zip(tops, logprobs, strict=True))


def test_scoring_needs_no_answer(client):
    reply = put(client, tokens_to_generate=0, logprobs=True)
    assert reply["text"] == PROMPTS
    assert [len(row) for row in reply["logprobs"]] == [len(ids) - 1 for ids in reply["tokens"]]


def test_begin_tokens_are_added_once_unless_refused(client, words):
    with_begin, without = put(client, add_BOS=True), put(client, add_BOS=False)
    assert put(client)["tokens"] == with_begin["tokens"]
    for prompt, begun, bare in zip(PROMPTS, with_begin["tokens"], without["tokens"], strict=True):
        ids = words.encode(prompt)
        assert begun[: len(ids) + 1] == [words.bos, *ids]
        assert bare[: len(ids)] == ids
    assert put(client, prompts=[""])["text"][0]


def test_stops_of_every_kind(client, words):
    free = put(client, prompts=PROMPTS[:1], tokens_to_generate=12)
    ids, text = free["tokens"][0], free["text"][0]
    third = ids[len(words.encode(PROMPTS[0])) + 3]
    assert put(client, prompts=PROMPTS[:1], stop_token=third, tokens_to_generate=12)["tokens"][0][-1] == third
    word = text[len(PROMPTS[0]) + 5 : len(PROMPTS[0]) + 8]
    stopped = put(client, prompts=PROMPTS[:1], stop_words=[word], tokens_to_generate=12)["text"][0]
    assert stopped == text[: text.index(word, len(PROMPTS[0]))]


def test_samples_follow_the_seed(client):
    settings = {"top_k": 0, "temperature": 1.5}
    first, again, other = (put(client, random_seed=seed, **settings)["text"] for seed in (4, 4, 5))
    assert first == again != other
    assert put(client, top_k=0, top_p=1e-6)["text"] == put(client)["text"]  # so small a nucleus is greedy


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({}, "prompts"),
        ({"prompts": "x"}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": ["x"] * 129}, "128"),
        ({"prompts": ["x"], "max_len": 3}, "tokens_to_generate"),
        ({"prompts": ["x"], "sentences": ["x"]}, "prompts"),
        ({"prompts": ["x"], "beam_width": 3}, "beam search"),
        ({"prompts": ["x"], "tokens_to_generate": -1}, "tokens_to_generate"),
        ({"prompts": ["x"], "tokens_to_generate": 0}, "logprobs"),
        ({"prompts": ["x"], "tokens_to_generate": 999}, "context is 256"),
        ({"prompts": ["x"], "temperature": 0}, "temperature"),
        ({"prompts": ["x"], "top_k": 1001}, "top_k"),
        ({"prompts": ["x"], "top_k": 2, "top_p": 0.5}, "both"),
        ({"prompts": [""], "add_BOS": False}, "add_BOS"),
        ({"prompts": ["x"], "random_seed": -1}, "random_seed"),
        ({"prompts": ["x"], "top_p": float("nan")}, "top_p"),
        ({"prompts": ["x"], "nonsense": 1}, "nonsense"),
    ],
)
def test_mistakes_are_400_with_a_message(client, body, says):
    import json

    headers = {"Content-Type": "application/json"}
    reply = client.put("/api", content=json.dumps(body), headers=headers)
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["message"]
