"""The `openai` package against a real server: every combination that its users combine."""

import asyncio
import itertools
import json

import openai
import pytest

from megatron_mixtral.serve.engine import json_grammar
from megatron_mixtral.tokenization import tokenizer

TEXT = "The quick brown fox"


@pytest.fixture(scope="module")
def running(plain_server):
    return plain_server


@pytest.fixture(scope="module")
def words(served_model):
    return tokenizer.load(served_model[0])


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as made:
        yield made


class Both:
    """The same call by the sync and the async client; what it returns is checked to be alike."""

    def __init__(self, running, is_async):
        self.is_async, self.options = (
            is_async,
            {"base_url": f"{running.url}/v1", "api_key": "none", "max_retries": 0},
        )

    def __call__(self, kind, **body):
        return asyncio.run(self._later(kind, body)) if self.is_async else self._now(kind, body)

    def _now(self, kind, body):
        with openai.OpenAI(**self.options) as client:
            create = client.chat.completions.create if kind == "chat" else client.completions.create
            answer = create(model="tiny", **body)
            return list(answer) if body.get("stream") else answer

    async def _later(self, kind, body):
        async with openai.AsyncOpenAI(**self.options) as client:
            create = client.chat.completions.create if kind == "chat" else client.completions.create
            answer = await create(model="tiny", **body)
            return [chunk async for chunk in answer] if body.get("stream") else answer


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def ask(running, request):
    return Both(running, request.param)


def joined(chunks, choices):
    """Streamed completions as whole ones; each choice ends exactly once, and nothing comes after that."""
    texts, scored, ends = [""] * choices, [[] for _ in range(choices)], [None] * choices
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        assert ends[choice.index] is None
        texts[choice.index] += choice.text
        if choice.logprobs:
            entry = choice.logprobs
            scored[choice.index] += zip(entry.tokens, entry.token_logprobs, entry.text_offset, strict=True)
        ends[choice.index] = choice.finish_reason
    assert None not in ends
    return texts, scored, ends


def prompts_of(kind, words):
    ids = [words.bos, *words.encode(TEXT)]
    other = [words.bos, *words.encode("Once upon")]
    return {"text": TEXT, "texts": [TEXT, "Once upon"], "ids": ids, "lists of ids": [ids, other]}[kind]


@pytest.mark.parametrize("kind", ["text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("echo", [False, True])
def test_completions_streamed_and_whole_are_the_same(ask, words, kind, n, logprobs, echo):
    body = {
        "prompt": prompts_of(kind, words),
        "max_tokens": 6,
        "n": n,
        "echo": echo,
        "logprobs": logprobs,
        "seed": 3,
    }
    whole = ask("text", **body)
    chunks = ask("text", **body, stream=True, stream_options={"include_usage": True})
    choices = n * (2 if kind in ("texts", "lists of ids") else 1)
    texts, scored, ends = joined(chunks, choices)
    assert texts == [c.text for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert [c.index for c in whole.choices] == list(range(choices))
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    check_usage(whole, words, n)
    for choice, entries in zip(whole.choices, scored, strict=True):
        check_scores(choice, entries, words, echo, logprobs)
    if echo:
        assert all(c.text.startswith((TEXT, "Once upon")) for c in whole.choices)


def check_usage(whole, words, n):
    prompts = [TEXT] if len(whole.choices) == n else [TEXT, "Once upon"]
    asked = sum(1 + len(words.encode(prompt)) for prompt in prompts)
    assert whole.usage.prompt_tokens == asked
    assert whole.usage.completion_tokens <= 6 * len(whole.choices)
    assert whole.usage.total_tokens == asked + whole.usage.completion_tokens


def check_scores(choice, entries, words, echo, logprobs):
    if logprobs is None:
        assert choice.logprobs is None
        assert entries == []
        return
    given = choice.logprobs
    assert [e[0] for e in entries] == given.tokens
    for (_, streamed, offset), logprob, place in zip(entries, given.token_logprobs, given.text_offset, strict=True):
        assert streamed == (logprob if logprob is None else pytest.approx(logprob, abs=1e-4))
        assert offset == place
    assert (given.token_logprobs[0] is None) == echo
    assert given.text_offset == sorted(given.text_offset)
    assert given.text_offset[-1] <= len(choice.text)
    if logprobs:
        assert all(len(top) in (2, 3) for top in given.top_logprobs if top is not None)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("top", [None, 0, 3])
@pytest.mark.parametrize("system", [False, True])
def test_chat_streamed_and_whole_are_the_same(ask, n, top, system):
    messages = [{"role": "system", "content": "Be brief."}] * system + [{"role": "user", "content": "Hello"}]
    scores = {} if top is None else {"logprobs": True, "top_logprobs": top}
    body = {"messages": messages, "max_completion_tokens": 7, "n": n, "seed": 11, **scores}
    whole = ask("chat", **body)
    chunks = ask("chat", **body, stream=True)
    texts, ends, roles = [""] * n, [None] * n, [0] * n
    tokens = [[] for _ in range(n)]
    for choice in itertools.chain.from_iterable(chunk.choices for chunk in chunks):
        assert ends[choice.index] is None
        texts[choice.index] += choice.delta.content or ""
        roles[choice.index] += choice.delta.role == "assistant"
        tokens[choice.index] += choice.logprobs.content if choice.logprobs else []
        ends[choice.index] = choice.finish_reason
    assert texts == [c.message.content for c in whole.choices]
    assert ends == [c.finish_reason for c in whole.choices]
    assert roles == [1] * n
    assert whole.usage.completion_tokens <= 7 * n
    for choice, streamed in zip(whole.choices, tokens, strict=True):
        if top is None:
            assert choice.logprobs is None
            continue
        assert [t.token for t in streamed] == [t.token for t in choice.logprobs.content]
        assert all(len(t.top_logprobs) == top for t in choice.logprobs.content)
        read = b"".join(bytes(t.bytes) for t in choice.logprobs.content).decode(errors="replace")
        assert choice.message.content.strip() in read


def test_chat_prompts_are_mistral_commons(client, words):
    """The prompt's length tells: `<s> [INST] question [/INST]` and nothing else."""
    from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    messages = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "And now?")]
    kinds = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}
    theirs = MistralTokenizer.v1().encode_chat_completion(
        ChatCompletionRequest(messages=[kinds[role](content=text) for role, text in messages])
    )
    whole = client.chat.completions.create(
        model="tiny", max_tokens=1, messages=[{"role": role, "content": text} for role, text in messages]
    )
    assert whole.usage.prompt_tokens == len(theirs.tokens)


def test_an_answer_comes_back_as_the_client_got_it(client):
    """With all its fields, most of them null; and a turn without words is one."""
    hello = {"role": "user", "content": "Hi"}
    body = {"model": "tiny", "max_tokens": 2}
    answer = client.chat.completions.create(**body, messages=[hello]).choices[0].message
    for said in (answer, answer.model_dump(), {"role": "assistant", "content": ""}):
        client.chat.completions.create(**body, messages=[hello, said, {"role": "user", "content": ""}])
    nothing = {"role": "system", "content": ""}
    lengths = {
        client.chat.completions.create(**body, messages=messages, tools=None).usage.prompt_tokens
        for messages in ([hello], [nothing, hello])
    }
    assert len(lengths) == 1


def test_ids_without_text_have_a_name_all_the_same(client):
    """Ids that only pad the model's vocabulary can be given, drawn and scored."""
    body = {"model": "tiny", "prompt": [1, 32001, 5], "max_tokens": 2, "logit_bias": {"32002": 100}, "logprobs": 2}
    choice = client.completions.create(**body, echo=True).choices[0]
    assert choice.logprobs.tokens[1] == "<32001>"
    assert choice.logprobs.tokens[3:] == ["<32002>", "<32002>"]
    assert choice.text == "\x02"
    streamed = client.completions.create(**body, stream=True)
    assert [t for chunk in streamed for c in chunk.choices for t in c.logprobs.tokens] == ["<32002>"] * 2


def test_greedy_ends_where_a_stop_string_begins(client):
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 12, "temperature": 0}
    free = client.completions.create(**body).choices[0].text
    stop = free[6:9]
    cut = client.completions.create(**body, stop=[stop, "never said"])
    assert cut.choices[0].text == free[: free.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    streamed = client.completions.create(**body, stop=stop, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == free[: free.index(stop)]


def test_the_end_token_stops_unless_ignored(client, words):
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 8, "temperature": 0, "logit_bias": {str(words.eos): 100}}
    ended = client.completions.create(**body)
    assert (ended.choices[0].finish_reason, ended.choices[0].text) == ("stop", "")
    assert ended.usage.completion_tokens == 1
    went_on = client.completions.create(**body, extra_body={"ignore_eos": True})
    assert (went_on.choices[0].finish_reason, went_on.usage.completion_tokens) == ("length", 8)


def test_bias_and_penalties_reach_the_sampler(client, words):
    hello = words.encode("Hello")[0]
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 3, "temperature": 0}
    biased = client.completions.create(**body, logit_bias={str(hello): 60})
    assert biased.choices[0].text == " Hello Hello Hello"
    penalised = client.completions.create(
        **body, logit_bias={str(hello): 2.0}, frequency_penalty=2, presence_penalty=2
    )
    assert penalised.choices[0].text.count("Hello") <= 1


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_json_object_is_one_or_the_beginning_of_one(client, words, temperature):
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "A JSON object, please"}],
        "response_format": {"type": "json_object"},
        "temperature": temperature,
        "seed": 5,
        "n": 3,
    }
    cut = client.chat.completions.create(**body, max_tokens=24)
    for choice in cut.choices:
        state = json_grammar.State()
        for byte in choice.message.content.encode():
            state = json_grammar.step(state, byte)
        assert state.complete == (choice.finish_reason == "stop")
    # This model says anything; one that leans to quotes and brackets comes to an end.
    leaning = {str(words.encode(f"a{mark}")[-1]): weight for mark, weight in (('"', 70), ("}", 60))}
    whole = client.chat.completions.create(**body, max_tokens=40, logit_bias=leaning, logprobs=True)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(json.loads(choice.message.content), dict)
        assert choice.logprobs.content[-1].token == "</s>"


def test_seeds_repeat_and_differ(client):
    def texts(seed):
        reply = client.completions.create(model="tiny", prompt=TEXT, max_tokens=8, seed=seed, n=2)
        return [c.text for c in reply.choices]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 2


def test_scoring_a_prompt_alone(client):
    scored = client.completions.create(model="tiny", prompt=TEXT, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == TEXT
    assert scored.usage.completion_tokens == 0
    assert len(scored.choices[0].logprobs.tokens) == scored.usage.prompt_tokens


def test_an_answer_without_a_limit_goes_to_the_end_of_the_context(client, running):
    reply = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "Hi"}], extra_body={"ignore_eos": True}
    )
    assert reply.usage.total_tokens == 256
    assert reply.choices[0].finish_reason == "length"


def test_head_is_get_without_a_body(running):
    with running.client() as client:
        for path, status in (("/health", 200), ("/", 200), ("/v1/models", 200), ("/v1/completions", 405)):
            reply = client.head(path)
            assert (reply.status_code, reply.content) == (status, b"")


def test_models(client):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError, match="doesn't exist"):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"prompt": "x", "temprature": 1}, "temprature", "unrecognized"),
        ({"prompt": "x", "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"prompt": "x", "top_p": 0}, "top_p", "greater than 0"),
        ({"prompt": "x", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "x", "n": True}, "n", "integer"),
        ({"prompt": "x", "max_tokens": 300}, "max_tokens", "context is 256"),
        ({"prompt": "x" * 3000}, "max_tokens", "context is 256"),
        ({"prompt": [1, 32003]}, "prompt", "vocabulary"),
        ({"prompt": ["x", 5]}, "prompt", "prompt.1: "),
        ({"prompt": "x", "stop": ["y", ""]}, "stop", "stop.1: "),
        ({"prompt": []}, "prompt", ""),
        ({"prompt": ["x"] * 8, "n": 65}, "n", "8 prompts x 65 choices are more than the 512"),
        ({"prompt": "x", "logit_bias": {"40000": 1}}, "logit_bias", "vocabulary"),
        ({"prompt": "x", "best_of": 3}, None, "best_of"),
        ({"prompt": "x", "suffix": "y"}, "suffix", ""),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, None, "stream"),
        ({"prompt": "\ud800"}, None, "surrogate"),
        ({}, "prompt", "required"),
    ],
)
def test_mistakes_are_named(running, body, param, says):
    headers = {"Content-Type": "application/json"}  # httpx's own encoder refuses what json.dumps lets through
    reply = running.client().post("/v1/completions", content=json.dumps(body), headers=headers)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b'{"prompt": "x"}', "text/plain"), (b"", "application/json"), (b"[1]", "application/json")],
)
def test_what_is_no_json_object_is_told_so(running, content, kind):
    """A browser lets any page send text/plain to a server on this machine, so it isn't read."""
    reply = running.client().post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert reply.status_code == 400
    assert "JSON object" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": None}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": []}, "tools"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, None),
    ],
)
def test_mistakes_in_chats_are_named(running, body, param):
    reply = running.client().post("/v1/chat/completions", json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_errors_are_the_openai_packages_own(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")
