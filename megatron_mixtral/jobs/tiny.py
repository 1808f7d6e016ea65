"""The job `tiny`: makes a small Mixtral with random weights in the hub's layout, with the real Mixtral tokenizer,
offline.

The folder looks like one that `download` made, so every reader of a downloaded Mixtral can read it.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from megatron_mixtral.errors import InputError
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import TinyConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.tokenization.chat_template import CHAT_TEMPLATE
from megatron_mixtral.weights.tensors import hub_shapes

VOCAB_SIZE = 32000
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def run(config: TinyConfig, run_dir: Path) -> None:
    make(config)


def make(config: TinyConfig) -> Path:
    """Write the folder `config.output`, which must not exist yet, and return it."""
    checks.check(config)
    shape = MixtralShape.from_hf(hub_config(config))
    output = Path(config.output)
    if output.exists():
        raise InputError(f"{output}: exists already; tiny writes a new folder")
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_json(partial / "config.json", hub_config(config))
    _write_json(
        partial / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "_from_model_config": True}
    )
    write_weights(partial, config, shape)
    write_tokenizer(partial)
    partial.rename(output)
    return output


def hub_config(config: TinyConfig) -> dict[str, Any]:
    """`config.json` with the names and constants of Mixtral-8x7B-v0.1's."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": config.hidden,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate,
        "max_position_embeddings": config.max_positions,
        "model_type": "mixtral",
        "num_attention_heads": config.heads,
        "num_experts_per_tok": config.top_k,
        "num_hidden_layers": config.layers,
        "num_key_value_heads": config.kv_heads,
        "num_local_experts": config.experts,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": config.dtype,
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def write_weights(folder: Path, config: TinyConfig, shape: MixtralShape) -> None:
    """`config.shards` safetensors files of about as many tensors each, and their index."""
    generator = torch.Generator().manual_seed(config.seed)
    tensors = {name: _random(size, config, generator) for name, size in hub_shapes(shape).items()}
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(config.shards):
        file = f"model-{number + 1:05d}-of-{config.shards:05d}.safetensors"
        cut = slice(number * len(names) // config.shards, (number + 1) * len(names) // config.shards)
        shard = {name: tensors[name] for name in names[cut]}
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {
        "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
        "weight_map": dict(sorted(weight_map.items())),
    }
    _write_json(folder / "model.safetensors.index.json", index)


def _random(shape: tuple[int, ...], config: TinyConfig, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # norms: near one and all different, so swapped layers are noticed
        tensor = 1 + 0.02 * torch.randn(shape, generator=generator)
    else:
        tensor = 0.02 * torch.randn(shape, generator=generator)
    return tensor.to(DTYPES[config.dtype])


def write_tokenizer(folder: Path) -> None:
    """The real Mixtral tokenizer: sentencepiece model, fast tokenizer, chat template, special tokens."""
    shutil.copyfile(mixtral_sentencepiece(), folder / "tokenizer.model")
    fast_tokenizer(folder / "tokenizer.model").save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    added = {
        str(i): {"content": piece, "special": True, "lstrip": False, "rstrip": False, "normalized": False}
        | {"single_word": False}
        for i, piece in enumerate(("<unk>", "<s>", "</s>"))
    }
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": added,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "legacy": True,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": None,
            "sp_model_kwargs": {},
            "spaces_between_special_tokens": False,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": False,
        },
    )


def mixtral_sentencepiece() -> Path:
    """Mixtral's `tokenizer.model`, as mistral-common carries it."""
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        raise InputError("the Mixtral tokenizer comes with mistral-common: pip install mistral-common")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


def fast_tokenizer(model_file: Path) -> Any:
    """The `tokenizers.Tokenizer` equal to a sentencepiece BPE model with byte fallback (hub: `tokenizer.json`).

    Without it transformers 5 reads the sentencepiece file without its leading-space rule, and the ids are wrong.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    pieces = SentencePieceProcessor(model_file=str(model_file))
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    scores = [pieces.get_score(i) for i in range(len(vocab))]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=_merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in ("<unk>", "<s>", "</s>")])
    return tokenizer


def _merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    # The best score merges first. Mixtral's runs of spaces share the worst score; among them the lower id wins.
    merges = []
    for piece, rank in vocab.items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [(-scores[rank], rank, vocab[a], vocab[b], a, b) for a, b in cuts if a in vocab and b in vocab]
    return [(a, b) for *_, a, b in sorted(merges)]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
