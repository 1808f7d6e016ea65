"""A server with experts in FP8 answers as transformers does with the weights that FP8 has made."""

import asyncio

import httpx
import pytest
import small_server

PROMPTS = [[1, 5, 17, 300], [1, *range(1000, 1070)]]


def rounded(folder, into):
    """The hub folder again, each expert's row in FP8 and back."""
    import torch
    from transformers import AutoModelForCausalLM

    from megatron_mixtral.model import fp8

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".experts." in name:
                values, scale = torch.empty_like(weight, dtype=fp8.DTYPE), torch.empty(weight.shape[:-1])
                fp8.quantize(weight, values, scale)
                weight.copy_(values.float() * scale.unsqueeze(-1))
    model.save_pretrained(into)
    return into


async def ask(url):
    body = {"model": "tiny", "max_tokens": small_server.ANSWER, "temperature": 0, "logprobs": 0, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        calls = [client.post("/v1/completions", json={**body, "prompt": p, "echo": True}) for p in PROMPTS]
        return [reply.json()["choices"][0]["logprobs"]["token_logprobs"] for reply in await asyncio.gather(*calls)]


def test_answers_are_those_of_the_rounded_weights(served_model, tmp_path):
    expected = small_server.continuations(rounded(served_model[0], tmp_path / "rounded"), PROMPTS)
    plain = small_server.continuations(served_model[0], PROMPTS)
    with small_server.server(tmp_path / "run", served_model[1], fp8_experts=True) as running:
        answers = asyncio.run(ask(running.url))
        assert "experts' weights in FP8 (e4m3, a scale a row)" in running.job.output()
    for got, (_, own), (_, without) in zip(answers, expected, plain, strict=True):
        assert got[1:] == pytest.approx(own, abs=1e-3)
        assert got[1:] != pytest.approx(without, abs=1e-2)


@pytest.mark.parametrize(
    ("capability", "says"),
    [((8, 0), "A100 has compute capability 8.0; FP8 needs 8.9 or newer"), ((8, 9), None), ((9, 0), None)],
)
def test_a_gpu_that_is_too_old_is_named(monkeypatch, capability, says):
    import torch

    from megatron_mixtral.mcore import cpu
    from megatron_mixtral.model import fp8

    monkeypatch.setattr(cpu, "HAVE_GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert fp8.missing() == says
