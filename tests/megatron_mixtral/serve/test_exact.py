"""The served model's greedy answers are transformers', token for token, at every layout and in a crowd."""

import asyncio
import random

import httpx
import pytest
import small_server

from megatron_mixtral.serve.engine import json_grammar

HUB, MEGATRON = 0, 1
OFTEN = ("PP1", "PP2", "EP2")  # each change is held to these, a release to all
LAYOUTS = {  # name -> ranks, layout, and which of the model's two forms on disk is served
    "PP1": (1, {}, MEGATRON),
    "PP2": (2, {"pipeline": 2}, MEGATRON),
    "EP2": (2, {"expert": 2}, HUB),
    "TP2": (2, {"tensor": 2}, MEGATRON),
    "TP2 ETP2": (2, {"tensor": 2, "expert_tensor": 2}, MEGATRON),
    "DP2": (2, {}, HUB),
    "PP2EP2": (4, {"pipeline": 2, "expert": 2}, HUB),
}
LENGTHS = (1, 2, 3, 5, 17, 40, 63, 64, 65, 130)  # around the edges of pages of 16 and steps of 64


@pytest.fixture(scope="module")
def reference(served_model):
    """64 prompts with what transformers makes of them."""
    draw = random.Random(5)
    prompts = [[1, *(draw.randrange(3, 32000) for _ in range(draw.choice(LENGTHS)))] for _ in range(64)]
    return prompts, small_server.continuations(served_model[0], prompts)


BODY = {"model": "tiny", "max_tokens": small_server.ANSWER, "temperature": 0, "logprobs": 0, "ignore_eos": True}


async def ask(client, prompt):
    reply = await client.post("/v1/completions", json={**BODY, "prompt": prompt, "echo": True})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]


async def leave(client, prompt, lines):
    """Hang up in the middle of a long answer."""
    body = {**BODY, "prompt": prompt, "max_tokens": 110, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            lines -= bool(line)
            if lines == 0:
                return
    raise AssertionError("the answer was over before the client left")


async def crowd(url, prompts):
    """All prompts at once, and as they are answered eight others come and go."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        quitters = [leave(client, prompts[i], 2 + 3 * i) for i in range(8)]
        answers = [ask(client, prompt) for prompt in prompts]
        return (await asyncio.gather(*quitters[:4], *answers, *quitters[4:]))[4 : 4 + len(prompts)]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in OFTEN else pytest.mark.soak) for name in LAYOUTS]
)
def test_64_prompts_at_once_while_others_leave(name, served_model, reference, tmp_path):
    ranks, layout, form = LAYOUTS[name]
    prompts, expected = reference
    with small_server.server(tmp_path, served_model[form], ranks=ranks, layout=layout, max_batch=16) as running:
        choices = asyncio.run(crowd(running.url, prompts))
        body = {"prompts": ["The cat", "Once"], "tokens_to_generate": small_server.ANSWER, "top_k": 1}
        raw = running.client().put("/api", json=body).json()
        check_json(running)
        assert running.stop() == [0] * ranks
    check_choices(choices, served_model[0], prompts, expected)
    check_megatron(raw, served_model[0])


def check_json(running):
    """Every rank draws for itself: only where all know the form do they draw the same."""
    body = {"messages": [{"role": "user", "content": "x"}], "n": 3, "max_tokens": 12, "seed": 1}
    body["response_format"] = {"type": "json_object"}
    reply = running.client().post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    for choice in reply.json()["choices"]:
        state = json_grammar.State()
        for byte in choice["message"]["content"].encode():
            state = json_grammar.step(state, byte)


def check_choices(choices, hub, prompts, expected):
    from megatron_mixtral.tokenization import tokenizer
    from megatron_mixtral.tokenization.token_text import token_text

    words = tokenizer.load(hub)
    assert len({token for tokens, _ in expected for token in tokens}) > 500, "the answers are too alike to tell"
    for choice, prompt, (tokens, logprobs) in zip(choices, prompts, expected, strict=True):
        got = choice["logprobs"]
        assert got["tokens"] == [token_text(words, t) for t in [*prompt, *tokens]]
        assert got["token_logprobs"][0] is None
        assert got["token_logprobs"][1:] == pytest.approx(logprobs, abs=1e-3)


def check_megatron(raw, hub):
    from megatron_mixtral.tokenization import tokenizer

    words = tokenizer.load(hub)
    prompts = [[words.bos, *words.encode(text)] for text in ("The cat", "Once")]
    for prompt, ids, text, (tokens, _) in zip(
        prompts, raw["tokens"], raw["text"], small_server.continuations(hub, prompts), strict=True
    ):
        answer = tokens[: tokens.index(words.eos) + 1] if words.eos in tokens else tokens
        assert ids == [*prompt, *answer]
        assert text == words.decode(ids)
