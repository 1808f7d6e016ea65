"""Drawing tokens: greedy where asked, fair otherwise, and untouched by the company in the batch."""

import math
from collections import Counter

import pytest
import torch

from megatron_mixtral.serve.engine.sampling import Sampler, inverse_draw, score
from megatron_mixtral.serve.messages import PromptScores, Request, Token, event_from_json

V = 50


def sampler(*requests):
    made = Sampler()
    for request in requests:
        made.add(request)
    return made


def request(id, **settings):
    return Request(**{"id": id, "prompt": [1], "max_tokens": 9, "seed": id, **settings})


def draw_many(logits, count, **settings):
    """`count` tokens of one request, in one call each."""
    one = sampler(request(0, **settings))
    return [one.choose(logits, [0])[0].token for _ in range(count)]


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-9}])
def test_greedy_takes_the_largest(settings):
    logits = torch.randn(1, V)
    assert draw_many(logits, 3, **settings) == [int(logits.argmax())] * 3


def test_draws_follow_the_distribution():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    counts = Counter(draw_many(logits, 6000))
    for token, probability in enumerate((0.5, 0.3, 0.2)):
        assert counts[token] / 6000 == pytest.approx(probability, abs=4 * math.sqrt(0.25 / 6000))


def test_temperature_sharpens():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    cold, hot = (Counter(draw_many(logits, 2000, temperature=t))[0] / 2000 for t in (0.5, 4.0))
    assert cold == pytest.approx(0.25 / 0.38, abs=0.05)
    assert hot < 0.42


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_p": 0.5}, {0}),
        ({"top_p": 0.51}, {0, 1}),
        ({"top_p": 1e-9}, {0}),
        ({"top_k": 3, "top_p": 0.85}, {0, 1, 2}),
        ({"top_k": 99}, {0, 1, 2, 3}),
    ],
)
def test_filters_keep_the_most_likely_only(settings, kept):
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert set(draw_many(logits, 1500, **settings)) == kept


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
def test_a_draw_at_either_end_stays_within_what_was_kept(uniform):
    logits = torch.randn(1, 32000)
    token = inverse_draw(logits, temperature=[1.0], top_k=[5], top_p=[0.9], uniform=[uniform])[0]
    assert token in logits.topk(5).indices


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_a_draw_never_takes_what_cannot_be(uniform):
    logits = torch.full((1, 32000), torch.finfo(torch.float32).min)
    logits[0, 5:9] = 0.0
    token = inverse_draw(logits, temperature=[1.0], top_k=[0], top_p=[1.0], uniform=[uniform])[0]
    assert token == (5 if uniform == 0 else 8)


def test_a_request_draws_alike_alone_and_in_company():
    torch.manual_seed(3)
    steps = torch.randn(6, 4, V)
    settings = [{"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.8}, {"frequency_penalty": 1.5}]
    together = sampler(*(request(i, **s) for i, s in enumerate(settings)))
    batched = [[c.token for c in together.choose(logits, [0, 1, 2, 3])] for logits in steps]
    for i, s in enumerate(settings):
        alone = sampler(request(i, **s))
        assert [alone.choose(logits[i : i + 1], [i])[0].token for logits in steps] == [row[i] for row in batched]


def test_seeds_decide():
    logits = torch.zeros(1, V)
    assert draw_many(logits, 8, seed=5) == draw_many(logits, 8, seed=5)
    assert draw_many(logits, 8, seed=5) != draw_many(logits, 8, seed=6)


def test_bias_and_penalties_shift_what_is_drawn_but_not_what_is_scored():
    logits = torch.zeros(1, V)
    logits[0, 3] = 1.0
    own = score(logits, torch.tensor([7]), 0)[0][0]
    one = sampler(request(0, temperature=0.0, logit_bias={7: 50.0}, logprobs=1))
    choice = one.choose(logits, [0])[0]
    assert (choice.token, choice.logprob) == (7, pytest.approx(own))
    assert choice.top[0][0] == 3
    assert draw_many(logits, 3, temperature=0.0, presence_penalty=1.5)[:2] == [3, 0]
    assert draw_many(logits, 3, temperature=0.0, frequency_penalty=0.6)[:3] == [3, 3, 0]


def test_each_request_gets_as_many_alternatives_as_it_asked_for():
    both = sampler(request(0, logprobs=0), request(1, logprobs=3), request(2))
    choices = both.choose(torch.randn(3, V), [0, 1, 2])
    assert [None if c.top is None else len(c.top) for c in choices] == [0, 3, None]
    assert choices[2].logprob is None


def test_requests_and_events_survive_the_wire():
    import json

    asked = request(4, logit_bias={5: 1.5}, stop_tokens=(2,), logprobs=3)
    assert Request.from_json(json.loads(json.dumps(asked.to_json()))) == asked
    for event in (
        Token(1, 5, -0.5, [(5, -0.5)], "stop"),
        Token(1, None, finish="length"),
        PromptScores(2, [-1.0], [[(1, -1.0)]]),
    ):
        assert event_from_json(json.loads(json.dumps(event.to_json()))) == event
