"""The small Mixtral is what the hub would serve: transformers loads it, and its tokenizer is the real one."""

import json

import pytest
from mistral_common.protocol.instruct.messages import AssistantMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from sentencepiece import SentencePieceProcessor
from transformers import AutoTokenizer, MixtralForCausalLM

from megatron_mixtral.errors import InputError
from megatron_mixtral.jobs.tiny import make
from megatron_mixtral.spec.jobs import TinyConfig

TEXTS = [
    "Hello world",
    " one space",
    "  two\n\n\tmixed   runs        of space",
    "héé 你好 🎉 \u3000",
    "\n",
    "[INST] x [/INST]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("tiny") / "model"
    return make(TinyConfig(output=str(output), layers=2, hidden=32, intermediate=64, heads=4, shards=3))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def test_transformers_loads_every_tensor_of_it(folder):
    model, info = MixtralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert model.config.num_local_experts == 8


def test_the_index_names_every_tensor_in_the_right_one_of_three_files(folder):
    from safetensors import safe_open

    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) == 3
    for file in set(weight_map.values()):
        with safe_open(folder / file, "pt") as shard:
            assert sorted(shard.keys()) == sorted(n for n, f in weight_map.items() if f == file)


@pytest.mark.parametrize("text", TEXTS)
def test_the_tokenizer_is_sentencepiece_id_for_id(folder, tokenizer, text):
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer(text).input_ids == [pieces.bos_id(), *pieces.encode(text)]
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_the_chat_template_is_mistrals_id_for_id(tokenizer):
    turns = ["What is 2+2?", "Four.", "Thanks, and 3+3?"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(turns)]
    reference = [(UserMessage, AssistantMessage)[i % 2](content=t) for i, t in enumerate(turns)]
    expected = MistralTokenizer.v1().encode_chat_completion(ChatCompletionRequest(messages=reference)).tokens
    assert tokenizer.apply_chat_template(messages, return_dict=False) == expected


def test_an_existing_folder_is_left_alone(folder):
    with pytest.raises(InputError, match="exists already"):
        make(TinyConfig(output=str(folder)))


def test_an_unknown_dtype_names_the_valid_ones(tmp_path):
    with pytest.raises(InputError, match="bfloat16, float16, float32"):
        make(TinyConfig(output=str(tmp_path / "x"), dtype="int8"))
    assert not list(tmp_path.iterdir())
