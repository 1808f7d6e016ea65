"""Word problems with worked answers, as in GSM8K: the answers are learnt and nothing else, and so they come back.

GSM8K_JSONL names the real file; without it problems of the same form are made up.
"""

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mistral_reference
import numpy as np
import openai
import pytest

from megatron_mixtral.data.dataset import Documents
from megatron_mixtral.jobs import prepare
from megatron_mixtral.spec.jobs import PrepareConfig

NAMES = ("Ann", "Bo", "Cleo", "Dan")
THINGS = ("apples", "books", "shells", "coins")
SYSTEM = "Work it out step by step; the number comes last."
# A worked answer: at least one step of a calculator, and the number by itself on the last line.
FORM = re.compile(r".*<<[^<>]+=[^<>]+>>.*\n#### -?[\d.,]+", re.S)


def problems() -> list[dict[str, str]]:
    if path := os.environ.get("GSM8K_JSONL"):
        return [json.loads(line) for line in Path(path).read_text().splitlines()]
    draw = random.Random(1)
    return [made_up(draw) for _ in range(400)]


def made_up(draw: random.Random) -> dict[str, str]:
    name, thing = draw.choice(NAMES), draw.choice(THINGS)
    a, b, c = (draw.randrange(2, 30) for _ in range(3))
    return {
        "question": f"{name} has {a} {thing}, finds {b} more and gives away {c}. How many {thing} are left?",
        "answer": f"{name} then has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n"
        f"Left are {a + b}-{c} = <<{a + b}-{c}={a + b - c}>>{a + b - c} {thing}.\n#### {a + b - c}",
    }


def talks() -> list[list[dict[str, str]]]:
    """Every problem by itself; and each three in a row as one conversation, every other with a system message."""
    said = [[("user", p["question"]), ("assistant", p["answer"])] for p in problems()]
    chained = [[turn for talk in said[n : n + 3] for turn in talk] for n in range(0, len(said), 3)]
    chained = [[("system", SYSTEM), *talk] if n % 2 else talk for n, talk in enumerate(chained)]
    return [[{"role": role, "content": content} for role, content in talk] for talk in said + chained]


def write(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_mask_covers_exactly_the_answers(tmp_path, tokenizer_folder):
    """Token by token against mistral-common, for every conversation, from prompts and answers and from messages."""
    pairs = write(tmp_path / "pairs.jsonl", problems())
    wanted = talks()
    several = write(tmp_path / "several.jsonl", [{"messages": talk} for talk in wanted[len(problems()) :]])
    config = PrepareConfig(
        inputs=[str(pairs), str(several)],
        output=str(tmp_path / "out"),
        tokenizer=str(tokenizer_folder),
        prompt_key="question",
        completion_key="answer",
    )
    prepare.run(config, tmp_path)
    stored = Documents(tmp_path / "out")
    assert len(stored) == len(wanted)
    for number, talk in enumerate(wanted):
        found = tuple(part.tolist() for part in stored.read(number, 0, None))
        assert found == mistral_reference.ids_and_mask(talk), talk
    assert 0.2 < np.mean(stored.masks) < 0.9


KEPT = 40  # the shortest problems: few enough to be known by heart after a minute or two on two cores
MODEL = "--layers 2 --hidden 128 --intermediate 256 --heads 4 --dtype float32"
TRAINING = (
    "--ep 2 --steps 120 --sequence-length 256 --micro-batch 4 --global-batch 8 --precision fp32 --lr 4e-3 "
    "--min-lr 4e-4 --warmup-steps 10 --validation 0.1 --eval-interval 15 --save-interval 120"
)


def mixlaunch(folder: Path, *words: str) -> str:
    environment = os.environ | {"MIXLAUNCH_STATE": str(folder), "MIXLAUNCH_CLUSTER": "local"}
    argv = [sys.executable, "-P", "-m", "launcher", *words]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_a_finetuned_model_answers_in_the_trained_form_when_its_export_is_served(tmp_path):
    """By the commands that a user types. So small a model learns the form by knowing its few problems by heart."""
    rows = sorted(problems(), key=lambda p: len(p["question"] + p["answer"]))[:KEPT]
    text = write(tmp_path / "problems.jsonl", rows)
    hub, converted, exported = (f"{tmp_path}/models/{name}" for name in ("tiny", "tiny-megatron", "tuned"))
    mixlaunch(tmp_path, "tiny", "--output", hub, *MODEL.split())
    keys = ("--prompt-key", "question", "--completion-key", "answer")
    told = mixlaunch(tmp_path, "prepare", str(text), "--model", hub, *keys, "--show", "1")
    assert re.search(r"\[ / INST \]«.*#### .*</s>»", told), told
    mixlaunch(tmp_path, "convert", "--model", hub)
    mixlaunch(tmp_path, "finetune", "--model", converted, *TRAINING.split())
    (run,) = tmp_path.glob("runs/finetune-*")
    assert_learnt([json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()])
    mixlaunch(tmp_path, "convert", "--to", "hf", "--model", str(run), "--output", exported)
    with served(tmp_path, exported) as client:
        answers = [ask(client, row["question"]) for row in rows]
    asked = [(FORM.fullmatch(a.message.content) is not None, a.finish_reason) for a in answers]
    right = sum(a.message.content == row["answer"] for a, row in zip(answers, rows, strict=True))
    print(f"{asked.count((True, 'stop'))} of {KEPT} in the trained form and ended, {right} word for word")
    assert asked.count((True, "stop")) >= 0.9 * KEPT, [a.message.content for a in answers]
    assert right >= 0.8 * KEPT  # all that weren't kept for validation, but one or two


def assert_learnt(events: list[dict]) -> None:
    losses = [e["loss"] for e in events if e["event"] == "step"]
    validation = [e["loss"] for e in events if e["event"] == "eval"]
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.3f}, validation {[round(x, 2) for x in validation]}")
    assert losses[0] > 9
    assert losses[-1] < 0.3
    assert min(validation) < validation[0]  # it rises again where problems are known by heart


@contextlib.contextmanager
def served(folder: Path, model: str) -> Iterator[openai.OpenAI]:
    mixlaunch(folder, "serve", "--model", model, "--precision", "fp32", "--no-wait")
    (run,) = folder.glob("runs/serve-*")
    try:
        end = time.monotonic() + 120
        while not (run / "server.json").exists():
            assert time.monotonic() < end, [log.read_text() for log in run.glob("logs/*/*.log")]
            time.sleep(0.2)
        url = json.loads((run / "server.json").read_text())["url"]
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    finally:
        mixlaunch(folder, "cancel", run.name)


def ask(client: openai.OpenAI, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    done = client.chat.completions.create(model="tuned", messages=messages, temperature=0, max_tokens=200)
    return done.choices[0]
