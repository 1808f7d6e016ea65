"""Training and serving as jobs on one and two GPUs: what only NCCL, bf16 and the fused kernels can get wrong.

Losses are held to those of one GPU in fp32, served log probabilities to transformers' in fp32.
"""

import json
import os

import httpx
import jobs
import numpy as np
import pytest
import serving
import torch
from ranks import ranks
from small import SHAPE, make_weights
from test_packing import finetuned, of_kind, raw_config, write_chats

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.timeout(400),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")
WIDER = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A model to train and conversations packed into its sequences; the run's settings."""
    folder = tmp_path_factory.mktemp("chats")
    (folder / "config.json").write_text(json.dumps(SHAPE | WIDER | {"initializer_range": 0.06}))
    ranks(1, make_weights, folder)
    write_chats(folder / "chats", np.random.default_rng(2).integers(4, 60, 80))
    return raw_config(
        folder,
        folder / "chats",
        steps=10,
        lr=1e-3,
        min_lr=1e-3,
        packing="documents",
        eval_interval=10,
        save_interval=5,
    )


@pytest.fixture(scope="module")
def expected(chats, tmp_path_factory):
    """One GPU, fp32."""
    variants = {"fp32": {}, "bf16": {"precision": "bf16"}}
    return ranks(1, finetuned, chats, variants, str(tmp_path_factory.mktemp("one")), timeout=300)[0]


def at_each_layout(raw, variants, folder):
    """What `finetuned` tells, each variant with a store of its own: one port serves one process group."""
    told = {}
    for name, change in variants.items():
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
        told |= finetuned(raw, {name: change}, folder)
    return told


def losses(told):
    return np.array(of_kind(told, "step", "loss"))


def test_packed_training_in_bf16_follows_fp32(expected):
    plain, half = losses(expected["fp32"]), losses(expected["bf16"])
    assert plain[-1] < plain[0] - 0.3
    assert half == pytest.approx(plain, abs=0.06)
    assert of_kind(expected["bf16"], "eval", "loss") == pytest.approx(
        of_kind(expected["fp32"], "eval", "loss"), abs=0.06
    )
    assert all(
        step["tokens_dropped"] == 0 and step["expert_load"] >= 1
        for step in expected["bf16"]
        if step["event"] == "step"
    )


@two_gpus
def test_two_gpus_train_as_one(chats, expected, tmp_path):
    layouts = {"data": {}, "pipeline": {"pipeline": 2}, "expert": {"expert": 2}, "tensor": {"tensor": 2}}
    variants = {name: {"layout": layout} for name, layout in layouts.items()}
    variants |= {f"{name} bf16": change | {"precision": "bf16"} for name, change in variants.items()}
    found = ranks(2, at_each_layout, chats, variants, str(tmp_path), timeout=200)[0]
    for name, told in found.items():
        near = {"abs": 0.06} if "bf16" in name else {"abs": 1e-3}
        assert losses(told) == pytest.approx(losses(expected["fp32"]), **near), name


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=two_gpus)])
@pytest.mark.parametrize("adapters", [{}, {"lora": 8, "lora_experts": True, "lr": 2e-2, "min_lr": 2e-2}])
def test_a_run_goes_on_where_it_was_stopped(chats, adapters, count, tmp_path):
    config = chats | adapters | {"precision": "bf16", "async_save": True, "layout": {"expert": count}}
    whole = jobs.run("finetune", config, tmp_path / "whole", ranks=count)
    jobs.run("finetune", config | {"steps": 5}, tmp_path / "parts", ranks=count)
    parts = jobs.run("finetune", config, tmp_path / "parts", ranks=count)
    found = np.array(of_kind(parts.events("step"), "step", "loss"))
    assert len(found) == 10
    assert found[-1] < found[0] - 0.3
    assert found == pytest.approx(losses(whole.events("step")), abs=0.06)


@pytest.fixture(scope="module")
def larger_model(tmp_path_factory):
    """(its hub folder, prompts continued by transformers in fp32, how far transformers' own bf16 is from that).

    How far: the mean over all tokens of what a log probability changes by. Single tokens whose second expert is
    nearly a third one change by much more.
    """
    from transformers import AutoModelForCausalLM

    folder = serving.make_model(
        tmp_path_factory.mktemp("larger"),
        hidden_size=256,
        intermediate_size=384,
        head_dim=64,
        num_key_value_heads=4,
        initializer_range=0.08,
    )
    draw = np.random.default_rng(5)
    prompts = [[1, *draw.integers(3, 32000, n).tolist()] for n in (1, 5, 63, 64, 65, 130)]
    found = serving.continuations(folder, prompts)
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        differences = [
            np.abs(np.array(serving.of_tokens(rounded, torch.tensor([prompt + tokens]))) - logprobs)
            for prompt, (tokens, logprobs) in zip(prompts, found, strict=True)
        ]
    return folder, list(zip(prompts, found, strict=True)), float(np.concatenate(differences).mean())


LAYOUTS = {
    "one": (1, {}),
    "pipeline": (2, {"pipeline": 2}),
    "expert": (2, {"expert": 2}),
    "tensor": (2, {"tensor": 2}),
    "data": (2, {}),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "one" else two_gpus) for n in LAYOUTS])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_served_log_probabilities_are_transformers(larger_model, name, precision, tmp_path):
    folder, expected, rounding = larger_model
    count, layout = LAYOUTS[name]
    body = {"model": "tiny", "max_tokens": serving.ANSWER, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    differences = []
    with serving.server(tmp_path, folder, ranks=count, layout=layout, precision=precision) as running:
        with httpx.Client(base_url=running.url, timeout=120) as client:
            for prompt, (tokens, logprobs) in expected:
                asked = body | {"prompt": prompt + tokens, "echo": True, "max_tokens": 1}
                own = client.post("/v1/completions", json=asked).json()["choices"][0]["logprobs"]["token_logprobs"]
                differences.append(np.abs(np.array(own[1 : len(logprobs) + 1]) - logprobs))
                choice = client.post("/v1/completions", json=body | {"prompt": prompt}).json()["choices"][0]
                greedy = choice["logprobs"]["token_logprobs"]
                if precision == "fp32":
                    assert np.array(greedy) == pytest.approx(np.array(logprobs[-serving.ANSWER :]), abs=1e-2)
                assert len(greedy) == serving.ANSWER
        assert running.stop() == [0] * count
    apart = np.concatenate(differences)
    if precision == "fp32":
        assert apart.max() < 1e-2
        assert apart.mean() < 1e-3
    else:
        assert apart.mean() < 1.5 * rounding
