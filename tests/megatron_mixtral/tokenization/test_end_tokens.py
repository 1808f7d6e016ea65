"""What is learnt as an answer's end is what servers stop at, and what an export tells transformers to stop at."""

import json
import shutil

import conversations
import pytest
import run_job
import tokenizer_folders
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from megatron_mixtral.data import loader
from megatron_mixtral.data.dataset import Documents
from megatron_mixtral.tokenization import chat_template, tokenizer

TALKS = [conversations.PLAIN[n] for n in (0, 1, 2, 9)] + [conversations.SYSTEM[0]]


def exported(folder, form, out):
    """The folder as it goes with weights that learnt conversations by `form`."""
    corpus = loader.Corpus(
        train=None, validation=None, identity={}, masked=True, notes=(), forms=frozenset({form.source})
    )
    shutil.copytree(folder, out)
    for name, data in corpus.assets(folder).items():
        (out / name).write_bytes(data)
    return out


def where_generate_stops(folder):
    if (folder / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(folder).eos_token_id
    return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder)).eos_token_id


@pytest.mark.parametrize(
    ("kind", "asked"),
    [
        (tokenizer_folders.chatml_nous, None),
        (tokenizer_folders.chatml_nous, "mistral"),
        (tokenizer_folders.chatml_metaspace, "mistral"),
        (tokenizer_folders.chatml_eos_list, None),
        (tokenizer_folders.chatml_eos_list, "mistral"),
        (tokenizer_folders.contradictory, None),
        (tokenizer_folders.v1_both, None),
        (tokenizer_folders.v1_metaspace, None),
        (tokenizer_folders.v3_both, None),
    ],
)
def test_an_export_is_asked_and_stops_as_it_learnt(tmp_path, kind, asked):
    kind(tmp_path / "hub")
    words = tokenizer.load(tmp_path / "hub")
    form = chat_template.form(words, asked)
    out = exported(tmp_path / "hub", form, tmp_path / "out")
    known, stops = AutoTokenizer.from_pretrained(out), where_generate_stops(out)
    for talk in TALKS[: 4 if kind is tokenizer_folders.v1_both else 5]:
        ids, mask = form.example(talk)
        assert known.apply_chat_template(talk, return_dict=False) == ids
        ends = {a for a, bit, after in zip(ids, mask, [*mask[1:], 0], strict=True) if bit and not after}
        assert ends <= set(words.ends)
        assert ends <= set(stops if isinstance(stops, list) else [stops])
    again = tokenizer.load(out)
    assert set(again.ends) == set(words.ends)
    assert chat_template.form(again).example(TALKS[0])[0] == form.example(TALKS[0])[0]


def test_from_data_to_an_answer_of_transformers_it_is_one_end_token(tmp_path):
    """A ChatML model learns a conversation by heart, is exported, and transformers' generate ends where it ends."""
    hub, talk = tmp_path / "hub", conversations.talk("How are you?", "Fine, thanks.")
    tokenizer_folders.chatml_nous(hub)
    shape = {name: value for name, value in json.loads((hub / "config.json").read_text()).items()}
    torch.manual_seed(1)
    MixtralForCausalLM(MixtralConfig(**shape, rope_theta=1e6, head_dim=16)).save_pretrained(hub)
    (tmp_path / "talks.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 16)
    run_job.run(
        "prepare",
        {"inputs": [str(tmp_path / "talks.jsonl")], "output": str(tmp_path / "data"), "tokenizer": str(hub)},
        tmp_path / "prepare",
    )
    ids, mask = Documents(tmp_path / "data").read(0, 0, None)
    assert [n for n, bit in zip(ids.tolist(), mask, strict=True) if bit][-1] == 32000
    run_job.run("convert", {"source": str(hub), "output": str(tmp_path / "megatron")}, tmp_path / "convert")
    settings = {
        "steps": 25,
        "sequence_length": 64,
        "global_batch": 8,
        "lr": 3e-3,
        "min_lr": 3e-3,
        "warmup_steps": 0,
    }
    settings |= {"validation": 0.0, "precision": "fp32", "save_interval": 25, "packing": "none"}
    run = tmp_path / "finetune"
    run_job.run("finetune", {"model": str(tmp_path / "megatron"), "data": str(tmp_path / "data"), **settings}, run)
    out = tmp_path / "out"
    run_job.run("convert", {"source": str(run), "output": str(out), "to": "hf"}, tmp_path / "back")
    known, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    asked = known.apply_chat_template(talk[:1], add_generation_prompt=True, return_dict=False)
    said = model.generate(torch.tensor([asked]), max_new_tokens=30, do_sample=False)[0, len(asked) :].tolist()
    assert said[-1] == 32000
    assert known.decode(said, skip_special_tokens=True) == "Fine, thanks."
    assert tokenizer.load(out).ends == (32000,)
