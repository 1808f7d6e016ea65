"""The sizes of a Mixtral: from the hub's `config.json`, or of a published one by its name."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.spec.options import SpecError

MODEL = "mistralai/Mixtral-8x7B-v0.1"  # what every job works on unless told otherwise


@dataclass(frozen=True, kw_only=True)
class MixtralShape:
    """Sizes of one Mixtral; the names and defaults are those of the hub's `config.json`."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    max_position_embeddings: int = 32768
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> "MixtralShape":
        """From the parsed `config.json`; `SpecError` for another model type or a missing size."""
        if config.get("model_type") != "mixtral":
            raise _refused(f"config.json: model_type is {config.get('model_type')!r}; mixtral is supported")
        known = config | _rope(config)
        heads, hidden = known.get("num_attention_heads"), known.get("hidden_size")
        if not known.get("head_dim"):
            known["head_dim"] = 1  # unless the two are numbers, and then they are named below
            if type(heads) is type(hidden) is int and heads > 0 < hidden:
                if hidden % heads:
                    raise _refused(f"config.json: hidden_size {hidden} / num_attention_heads {heads} isn't whole")
                known["head_dim"] = hidden // heads
        if known.setdefault("num_key_value_heads", 8) is None:  # as transformers takes each of the two
            known["num_key_value_heads"] = known.get("num_attention_heads")
        for name in ("tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"):
            if known.get(name) is None:
                known.pop(name, None)
        if (activation := known.get("hidden_act") or "silu") != "silu":
            raise _refused(f"config.json: hidden_act is {activation!r}; Mixtral's, silu, is supported")
        names = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(n for n in required if known.get(n) is None):
            raise _refused(f"config.json: {', '.join(missing)} missing")
        shape = cls(**{k: v for k, v in known.items() if k in names})
        shape._check()
        return shape

    def _check(self) -> None:
        """`SpecError` naming the first size that no model can have."""
        for field_ in dataclasses.fields(self):
            value, whole = getattr(self, field_.name), field_.default is dataclasses.MISSING
            whole = whole or field_.name == "max_position_embeddings"
            optional = field_.name == "sliding_window" and value is not None
            if (whole or optional) and (type(value) is not int or value < 1):
                raise _refused(f"config.json: {field_.name} is {value!r}; it must be a whole number above 0")
        if type(self.tie_word_embeddings) is not bool:
            raise _refused(
                f"config.json: tie_word_embeddings is {self.tie_word_embeddings!r}; it must be a boolean"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:  # nor NaN
                raise _refused(f"config.json: {name} is {value!r}; it must be a number above 0")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise _refused(f"config.json: num_attention_heads {heads} / num_key_value_heads {groups} isn't whole")
        if self.num_experts_per_tok > self.num_local_experts:
            chosen, there = self.num_experts_per_tok, self.num_local_experts
            raise _refused(f"config.json: num_experts_per_tok {chosen} of num_local_experts {there}")

    @property
    def query_width(self) -> int:
        """Width of all queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Width of all keys."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_folder(cls, folder: Path) -> "MixtralShape":
        """From `folder/config.json`; `SpecError` names the file that is missing or isn't JSON."""
        path = folder / "config.json"
        try:
            return cls.from_hf(json.loads(path.read_text()))
        except SpecError as error:
            raise _refused(str(error).replace("config.json", str(path), 1)) from error
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise _refused(f"{path}: {error}") from error


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, which transformers 5 nests; `SpecError` for scaled rotations, which no job computes."""
    nests = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, nest in nests.items():
        kind = nest.get("rope_type") or nest.get("type") or "default"
        if kind != "default":
            raise _refused(f"config.json: {name} asks for {kind!r}; only the default rotation is supported")
    found = nests["rope_parameters"].get("rope_theta") or config.get("rope_theta")
    return {"rope_theta": 1e6 if found is None else found}


def _refused(text: str) -> SpecError:
    return SpecError("{}", text)


PUBLISHED = {
    "8x7B": MixtralShape(
        num_hidden_layers=32,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
    ),
    "8x22B": MixtralShape(
        num_hidden_layers=56,
        hidden_size=6144,
        intermediate_size=16384,
        num_attention_heads=48,
        num_key_value_heads=8,
        head_dim=128,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32768,  # the Instruct model's; the base model has 32000
        max_position_embeddings=65536,
    ),
}


def published(model: str) -> MixtralShape | None:
    """The shape of a published Mixtral by its repository's name; None for any other."""
    return next((shape for size, shape in PUBLISHED.items() if f"Mixtral-{size}" in model), None)
