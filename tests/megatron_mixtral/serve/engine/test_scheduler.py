"""Which tokens steps compute: every request's all, once, on pages of its own, however small the cache is."""

import random

import pytest

from megatron_mixtral.serve.engine.scheduler import Scheduler
from megatron_mixtral.serve.messages import Request


def request(number, prompt, answer, stop=-1):
    return Request(id=number, prompt=list(range(prompt)), max_tokens=answer, seed=0, stop_tokens=(stop,))


def made(**changes):
    return Scheduler(**{"slots": 4, "pages": 12, "page": 4, "context": 24, "step_tokens": 16} | changes)


class Cache:
    """Plays the device: remembers what lies on the pages, and draws each token of what it read."""

    def __init__(self, page):
        self.page, self.kept, self.drawn = page, {}, {}

    def run(self, plan):
        """What each row draws; a token is a number that follows from all before it."""
        tokens, at = [], 0
        for row, slot in enumerate(plan.slots.tolist()):
            for position in range(plan.first[row], plan.first[row] + plan.counts[row]):
                token = int(plan.ids[at])
                if token < 0:
                    assert token == -1 - slot
                    token = self.drawn[slot]
                self.kept[int(plan.table[row, position // self.page]), position % self.page] = token
                at += 1
            length = plan.first[row] + plan.counts[row]
            pages = plan.table[row].tolist()
            read = [self.kept[pages[p // self.page], p % self.page] for p in range(length)]
            tokens.append(follower(read))
            if plan.draws[row]:
                self.drawn[slot] = tokens[-1]
        assert at == plan.tokens
        return tokens


def follower(tokens):
    return sum(i * t for i, t in enumerate(tokens, 1)) % 997


def answer_of(asked):
    tokens = list(asked.prompt)
    for _ in range(max(asked.max_tokens, 1)):
        tokens.append(follower(tokens))
        if tokens[-1] in asked.stop_tokens:
            break
    return tokens


def served(scheduler, asked, *, ahead, cancel=()):
    """All requests' tokens; with `ahead`, a step's are told after the next one was planned."""
    cache, flying, ended = Cache(scheduler.page), [], []
    sequences = [scheduler.add(one) for one in asked]
    for steps in range(10_000):
        plan = scheduler.plan()
        for sequence in cancel if steps == 3 else ():
            scheduler.end(sequences[sequence])
        if plan is not None:
            assert len(set(plan.slots.tolist())) == len(plan.slots)
            assert plan.tokens <= scheduler.step_tokens
            flying.append((plan, cache.run(plan)))
        for told, tokens in flying[: None if plan is None or not ahead else -1]:
            for row in told.draws.nonzero()[0]:
                if not told.sequences[row].ended and scheduler.took(told.sequences[row], tokens[row]):
                    ended.append(told.sequences[row].request.id)
        flying = flying[-1:] if ahead and plan is not None else []
        if not scheduler.busy and not flying:
            assert scheduler.used == 0
            return [sequence.tokens for sequence in sequences], ended
    raise AssertionError("it has no end")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("pages", [6, 9, 100])
def test_every_answer_is_what_it_is_alone(pages, ahead):
    draw = random.Random(pages)
    asked = [request(i, draw.randrange(1, 17), draw.randrange(0, 8)) for i in range(40)]
    tokens, ended = served(made(pages=pages), asked, ahead=ahead)
    assert tokens == [answer_of(one) for one in asked]
    assert sorted(ended) == list(range(40))


@pytest.mark.parametrize("ahead", [False, True])
def test_a_stop_token_ends_an_answer_whatever_is_under_way(ahead):
    asked = [request(i, 3 + i, 7) for i in range(8)]
    stops = [answer_of(one)[len(one.prompt) + i % 4] for i, one in enumerate(asked)]
    asked = [request(i, 3 + i, 7, stop) for i, stop in enumerate(stops)]
    tokens, _ = served(made(), asked, ahead=ahead)
    assert tokens == [answer_of(one) for one in asked]


def test_what_is_cancelled_gives_its_pages_back():
    asked = [request(i, 16, 7) for i in range(8)]
    tokens, ended = served(made(), asked, ahead=True, cancel=(0, 2, 7))
    assert [tokens[i] for i in (1, 3, 4, 5, 6)] == [answer_of(asked[i]) for i in (1, 3, 4, 5, 6)]
    assert sorted(ended) == [1, 3, 4, 5, 6]


def test_long_prompts_are_read_in_parts_beside_answers():
    scheduler = made(step_tokens=8, pages=100)
    scheduler.add(request(0, 2, 7))
    scheduler.plan()
    scheduler.add(request(1, 17, 2))
    counts = [scheduler.plan().counts.tolist() for _ in range(4)]
    assert counts == [[1, 7], [1, 7], [1, 3], [1, 1]]
