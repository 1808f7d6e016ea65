"""The served model's greedy answers are transformers', token for token, at every layout and under load."""

import random

import pytest
import serving

LAYOUTS = {
    "PP1": (1, {}),
    "PP2": (2, {"pipeline": 2}),
    "EP2": (2, {"expert": 2}),
    "TP2": (2, {"tensor": 2}),
    "PP2EP2": (4, {"pipeline": 2, "expert": 2}),
}
LENGTHS = (1, 2, 3, 5, 17, 40, 63, 64, 65, 130)  # around the edges of pages of 16 and steps of 64


@pytest.fixture(scope="module")
def reference(served_model):
    """64 prompts with what transformers makes of them."""
    draw = random.Random(5)
    prompts = [[1, *(draw.randrange(3, 32000) for _ in range(draw.choice(LENGTHS)))] for _ in range(64)]
    return prompts, serving.continuations(served_model[0], prompts)


@pytest.mark.parametrize("name", LAYOUTS)
def test_64_prompts_at_once_while_others_are_cancelled(name, served_model, reference, tmp_path):
    ranks, layout = LAYOUTS[name]
    prompts, expected = reference
    with serving.server(tmp_path, served_model[1], ranks=ranks, layout=layout, max_batch=16) as running:
        client = running.client()
        body = {"model": "tiny", "max_tokens": serving.ANSWER, "temperature": 0, "logprobs": 0, "ignore_eos": True}
        for prompt in prompts[:5]:  # these leave in the middle of their answers
            with client.stream(
                "POST", "/v1/completions", json={**body, "prompt": prompt, "max_tokens": 120, "stream": True}
            ) as response:
                lines = response.iter_lines()
                next(lines)
        reply = client.post("/v1/completions", json={**body, "prompt": prompts, "echo": True})
        assert reply.status_code == 200, reply.text
        raw = client.put(
            "/api", json={"prompts": ["The cat", "Once"], "tokens_to_generate": serving.ANSWER, "top_k": 1}
        ).json()
        assert running.stop() == [0] * ranks
    check_choices(reply.json()["choices"], served_model[0], prompts, expected)
    check_megatron(raw, served_model[0])


def check_choices(choices, hub, prompts, expected):
    from megatron_mixtral import tokenizer
    from megatron_mixtral.serve.text import token_text

    words = tokenizer.load(hub)
    assert len({token for tokens, _ in expected for token in tokens}) > 500, "the answers are too alike to tell"
    for choice, prompt, (tokens, logprobs) in zip(choices, prompts, expected, strict=True):
        got = choice["logprobs"]
        assert got["tokens"] == [token_text(words, t) for t in [*prompt, *tokens]]
        assert got["token_logprobs"][0] is None
        assert got["token_logprobs"][1:] == pytest.approx(logprobs, abs=1e-3)


def check_megatron(raw, hub):
    from megatron_mixtral import tokenizer

    words = tokenizer.load(hub)
    prompts = [[words.bos, *words.encode(text)] for text in ("The cat", "Once")]
    for prompt, ids, text, (tokens, _) in zip(
        prompts, raw["tokens"], raw["text"], serving.continuations(hub, prompts), strict=True
    ):
        answer = tokens[: tokens.index(words.eos) + 1] if words.eos in tokens else tokens
        assert ids == [*prompt, *answer]
        assert text == words.decode(ids)
