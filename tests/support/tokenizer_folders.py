"""Tokenizer folders as people have them, each of a kind that is on the hub, made of what mistral-common ships."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common

from megatron_mixtral.jobs import tiny

CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + "
    "'\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# 8x22B-Instruct's way: brackets are tokens, and no space stands before the closing one.
INST_V3 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + '[/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}{{ raise_exception('roles') }}"
    "{% endif %}{% endfor %}"
)
ROUNDS = (
    "{% for m in messages %}{{ bos_token + m.role + '\n' + m.content | trim + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\nTools: ' ~ tools | tojson ~ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '\n<tool_call>' ~ c.function | tojson ~ '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
END, START = "<|im_end|>", "<|im_start|>"
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}


def v3_model() -> Path:
    return Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@functools.cache
def hub_json(version: str) -> str:
    """`tokenizer.json` of v1 or v3, with its control tokens."""
    from sentencepiece import SentencePieceProcessor
    from tokenizers import AddedToken

    file = tiny.mixtral_sentencepiece() if version == "v1" else v3_model()
    made = tiny.fast_tokenizer(file)
    pieces = SentencePieceProcessor(model_file=str(file))
    control = [pieces.id_to_piece(n) for n in range(pieces.get_piece_size()) if pieces.is_control(n)]
    made.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    return made.to_str()


def added(content: str, **flags: bool) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {"content": content, **plain, **flags}


class Folder:
    """One being made."""

    def __init__(self, path: Path, version: str = "v1", vocab: int = 32000, eos: Any = 2) -> None:
        path.mkdir(parents=True)
        self.path, self.version = path, version
        self.config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        self.config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        shape |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        self.write("config.json", {"model_type": "mixtral", "vocab_size": vocab, "eos_token_id": eos, **shape})

    def write(self, name: str, value: Any) -> "Folder":
        (self.path / name).write_text(value if isinstance(value, str) else json.dumps(value))
        return self

    def model(self) -> "Folder":
        shutil.copyfile(
            tiny.mixtral_sentencepiece() if self.version == "v1" else v3_model(), self.path / "tokenizer.model"
        )
        return self

    def json(self, *more: dict[str, Any], **changes: Any) -> "Folder":
        """tokenizer.json with tokens added to it, and other parts."""
        known = json.loads(hub_json(self.version)) | changes
        first = len(known["model"]["vocab"])
        known["added_tokens"] += [{"id": first + n, **token} for n, token in enumerate(more)]
        return self.write("tokenizer.json", known)

    def settings(self, **changes: Any) -> "Folder":
        return self.write("tokenizer_config.json", {**self.config, **changes})


def _chatml(path: Path) -> Folder:
    return Folder(path, vocab=32002, eos=32000)


def v1_model_only(path: Path) -> None:
    Folder(path).model().settings(chat_template=tiny.CHAT_TEMPLATE)


def v1_both(path: Path) -> None:
    Folder(path).model().json().settings(chat_template=tiny.CHAT_TEMPLATE)


def v1_json_only(path: Path) -> None:
    Folder(path).json().settings(chat_template=tiny.CHAT_TEMPLATE)


def v1_metaspace(path: Path) -> None:
    Folder(path).json(normalizer=None, pre_tokenizer=METASPACE).settings(chat_template=tiny.CHAT_TEMPLATE)


def v1_base(path: Path) -> None:
    Folder(path).model().json().settings()


def chatml_nous(path: Path) -> None:
    """Nous-Hermes-2: every file side by side, the older two among them."""
    _chatml(path).model().json(added(END), added(START)).settings(eos_token=END, chat_template=CHATML).write(
        "added_tokens.json", {END: 32000, START: 32001}
    ).write("special_tokens_map.json", {"bos_token": "<s>", "eos_token": added(END), "unk_token": "<unk>"})


def chatml_dolphin(path: Path) -> None:
    """Dolphin: `added_tokens_decoder`, and a begin of turns that isn't special."""
    start = added(START, special=False)
    decoder = {"0": added("<unk>"), "1": added("<s>"), "2": added("</s>"), "32000": added(END), "32001": start}
    _chatml(path).model().json(added(END), start).settings(
        eos_token=END, added_tokens_decoder=decoder, chat_template=CHATML
    )


def chatml_metaspace(path: Path) -> None:
    """As newer conversions write it: a space before the text's first word alone."""
    _chatml(path).json(added(END), added(START), normalizer=None, pre_tokenizer=METASPACE).settings(
        eos_token=END, legacy=False, chat_template=CHATML
    )


def chatml_model_only(path: Path) -> None:
    _chatml(path).model().settings(eos_token=END, chat_template=CHATML).write(
        "added_tokens.json", {END: 32000, START: 32001}
    )


def chatml_special_map(path: Path) -> None:
    """The end token stands in special_tokens_map.json alone."""
    folder = _chatml(path)
    del folder.config["eos_token"]
    folder.json(added(END), added(START)).settings().write("chat_template.jinja", CHATML).write(
        "special_tokens_map.json", {"bos_token": "<s>", "eos_token": END}
    )


def chatml_eos_list(path: Path) -> None:
    """The tokenizer's end token is </s>; generation_config.json stops at both."""
    _chatml(path).model().json(added(END), added(START)).settings(chat_template=CHATML).write(
        "generation_config.json", {"eos_token_id": [2, 32000]}
    )


def contradictory(path: Path) -> None:
    """Three files with an end token each, and two templates."""
    decoder = {"32000": added(END), "32001": added(START)}
    _chatml(path).model().json(added(END), added(START)).settings(
        eos_token=END, added_tokens_decoder=decoder, chat_template=ROUNDS
    ).write("special_tokens_map.json", {"eos_token": "</s>"}).write("chat_template.jinja", CHATML).write(
        "added_tokens.json", {START: 32000, END: 32001}
    ).write("generation_config.json", {"eos_token_id": 32000})


def odd_flags(path: Path) -> None:
    """Added tokens that take the space beside them, one looked for in normalised text, one that is a word."""
    more = (added(END, rstrip=True), added(START, lstrip=True, special=False), added("<tool_call>", special=False))
    Folder(path, vocab=32004, eos=32000).json(*more, added("<x>", normalized=True, special=False)).settings(
        eos_token=END, chat_template=CHATML
    )


def template_file(path: Path) -> None:
    Folder(path).model().json().settings().write("chat_template.jinja", ROUNDS)


def llama_class(path: Path) -> None:
    """Without config.json transformers takes the class that tokenizer_config.json names."""
    folder = Folder(path).model().json().settings(chat_template=ROUNDS)
    (folder.path / "config.json").unlink()


def two_templates(path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": TOOLS}]
    _chatml(path).json(added(END), added(START)).settings(eos_token=END, chat_template=named)


def v3_both(path: Path) -> None:
    Folder(path, "v3", 32768).model().json().settings(chat_template=INST_V3)


def v3_json_only(path: Path) -> None:
    Folder(path, "v3", 32768).json().settings(chat_template=INST_V3)


def v3_model_only(path: Path) -> None:
    Folder(path, "v3", 32768).model().settings()


# By the form that is the reference.
V1: tuple[Callable[[Path], None], ...] = (v1_model_only, v1_both, v1_json_only, v1_metaspace, v1_base)
V3: tuple[Callable[[Path], None], ...] = (v3_both, v3_json_only, v3_model_only)
TEMPLATES: tuple[Callable[[Path], None], ...] = (
    chatml_nous,
    chatml_dolphin,
    chatml_metaspace,
    chatml_model_only,
    chatml_special_map,
    chatml_eos_list,
    contradictory,
    odd_flags,
    template_file,
    llama_class,
    two_templates,
)
