"""What a job is told: the model's shape from the hub's `config.json`, and one frozen dataclass per job.

The launcher writes `config.yaml` with exactly these names; an unknown or missing key is an error that lists them.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from megatron_mixtral.errors import InputError, LayoutError

T = TypeVar("T")


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
        """From the parsed `config.json`; `InputError` for another model type or a missing size."""
        if config.get("model_type") != "mixtral":
            raise InputError(f"config.json: model_type is {config.get('model_type')!r}; mixtral is supported")
        known = config | _rope(config)
        heads, hidden = known.get("num_attention_heads"), known.get("hidden_size")
        if not known.get("head_dim"):
            known["head_dim"] = 1  # unless the two are numbers, and then they are named below
            if type(heads) is type(hidden) is int and heads > 0 < hidden:
                if hidden % heads:
                    raise InputError(f"config.json: hidden_size {hidden} / num_attention_heads {heads} isn't whole")
                known["head_dim"] = hidden // heads
        if known.setdefault("num_key_value_heads", 8) is None:  # as transformers takes each of the two
            known["num_key_value_heads"] = known.get("num_attention_heads")
        for name in ("tie_word_embeddings", "max_position_embeddings", "rms_norm_eps"):
            if known.get(name) is None:
                known.pop(name, None)
        if (activation := known.get("hidden_act") or "silu") != "silu":
            raise InputError(f"config.json: hidden_act is {activation!r}; Mixtral's, silu, is supported")
        names = {f.name for f in dataclasses.fields(cls)}
        required = {f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING}
        if missing := sorted(n for n in required if known.get(n) is None):
            raise InputError(f"config.json: {', '.join(missing)} missing")
        shape = cls(**{k: v for k, v in known.items() if k in names})
        shape._check()
        return shape

    def _check(self) -> None:
        """`InputError` naming the first size that no model can have."""
        for field_ in dataclasses.fields(self):
            value, whole = getattr(self, field_.name), field_.default is dataclasses.MISSING
            whole = whole or field_.name == "max_position_embeddings"
            optional = field_.name == "sliding_window" and value is not None
            if (whole or optional) and (type(value) is not int or value < 1):
                raise InputError(f"config.json: {field_.name} is {value!r}; it must be a whole number above 0")
        if type(self.tie_word_embeddings) is not bool:
            raise InputError(
                f"config.json: tie_word_embeddings is {self.tie_word_embeddings!r}; it must be a boolean"
            )
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:  # nor NaN
                raise InputError(f"config.json: {name} is {value!r}; it must be a number above 0")
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        if heads % groups:
            raise InputError(f"config.json: num_attention_heads {heads} / num_key_value_heads {groups} isn't whole")
        if self.num_experts_per_tok > self.num_local_experts:
            chosen, there = self.num_experts_per_tok, self.num_local_experts
            raise InputError(f"config.json: num_experts_per_tok {chosen} of num_local_experts {there}")

    @classmethod
    def from_folder(cls, folder: Path) -> "MixtralShape":
        """From `folder/config.json`; `InputError` names the file that is missing or isn't JSON."""
        path = folder / "config.json"
        try:
            return cls.from_hf(json.loads(path.read_text()))
        except InputError as error:
            raise InputError(str(error).replace("config.json", str(path), 1)) from error
        except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
            raise InputError(f"{path}: {error}") from error


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    """`rope_theta`, which transformers 5 nests; `InputError` for scaled rotations, which no job computes."""
    nests = {name: config.get(name) or {} for name in ("rope_scaling", "rope_parameters")}
    for name, nest in nests.items():
        kind = nest.get("rope_type") or nest.get("type") or "default"
        if kind != "default":
            raise InputError(f"config.json: {name} asks for {kind!r}; only the default rotation is supported")
    found = nests["rope_parameters"].get("rope_theta") or config.get("rope_theta")
    return {"rope_theta": 1e6 if found is None else found}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How one model lies over the ranks: world = tensor x pipeline x context x data."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    context: int = 1

    def data_parallel(self, world: int) -> int:
        """Data-parallel size on `world` ranks; `LayoutError` carries the equation when it isn't whole."""
        model = self.tensor * self.pipeline * self.context
        equation = (
            f"world {world} = tensor {self.tensor} x pipeline {self.pipeline} x context {self.context} x data, "
            f"expert-tensor {self.expert_tensor} x expert {self.expert} divides world / pipeline"
        )
        if world % model or (world // self.pipeline) % (self.expert_tensor * self.expert):
            raise LayoutError(f"this layout doesn't fit: {equation}")
        return world // model

    def stages(self, layers: int) -> list[int]:
        """How many layers each pipeline stage holds: where they don't divide evenly, earlier ones one more."""
        whole, rest = divmod(layers, self.pipeline)
        return [whole + (stage < rest) for stage in range(self.pipeline)]

    def check(self, shape: MixtralShape) -> None:
        """`LayoutError` naming the two numbers when the model can't be cut this way."""
        for name, whole, parts in (
            ("experts / expert parallel", shape.num_local_experts, self.expert),
            ("query groups / tensor parallel", shape.num_key_value_heads, self.tensor),
            ("expert width / expert-tensor parallel", shape.intermediate_size, self.expert_tensor),
        ):
            if whole % parts:
                raise LayoutError(f"{name}: {whole} / {parts} isn't whole")
        if self.pipeline > shape.num_hidden_layers:
            raise LayoutError(f"pipeline {self.pipeline} has more stages than the {shape.num_hidden_layers} layers")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Make a small Mixtral with random weights in the hub's own layout."""

    output: str
    layers: int = 4
    hidden: int = 256
    intermediate: int = 512
    heads: int = 8
    kv_heads: int = 2
    experts: int = 8
    top_k: int = 2
    max_positions: int = 4096
    dtype: str = "bfloat16"
    shards: int = 2
    seed: int = 1234


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetch a repository from the hub."""

    repo: str
    output: str
    revision: str | None = None


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into Megatron's `.bin`/`.idx`."""

    inputs: list[str]
    output: str  # prefix: OUTPUT.bin, OUTPUT.idx
    tokenizer: str  # a hub folder or a tokenizer.model
    workers: int = 0  # 0: every core that this job may use
    text_key: str = "text"
    messages_key: str = "messages"
    prompt_key: str = "prompt"
    completion_key: str = "completion"
    chat_template: str | None = None  # a Jinja file, or "mistral"; None: the tokenizer's own, else mistral's
    max_bad: int = 0  # bad lines tolerated
    show: int = 0  # documents to print with their mask


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn weights between the hub's layout and Megatron's, or adapters into PEFT's."""

    source: str
    output: str
    to: str = "megatron"  # or "hf", or "peft" of a run of adapters
    base: str | None = None  # of a run of adapters: where its base is, if not where it was
    layout: Layout = field(default_factory=Layout)
    format: str = "torch_dist"  # or "legacy": a file for each rank of `layout`
    names: str = "te-grouped"  # of legacy files: whose parameters, see legacy.NAMES
    make_vocab_size_divisible_by: int = 128  # legacy files pad the vocabulary to this times tensor parallelism
    dtype: str | None = None  # None keeps the source's
    verify: bool = False  # read what was written back and compare
    check_finite: bool = False  # refuse NaN and infinity
    check_logits: bool = False  # compare with transformers before the output gets its name
    prompt: str = "The mixture of experts sends every token to two of eight."  # whose logits are compared
    tolerance: float = 1e-3  # largest difference of logits, in sizes of the largest logit
    max_shard_gb: float = 5.0  # of one file in the hub's layout


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute the digests of a converted folder."""

    folder: str


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train; values unless given are those of upstream's Mixtral example."""

    model: str  # a converted folder, or a run whose newest checkpoint to start from
    data: str | list[str]  # the prefix that `prepare` wrote, or several to blend, PREFIX:WEIGHT
    layout: Layout = field(default_factory=Layout)
    steps: int = 500
    sequence_length: int = 4096
    micro_batch: int = 1
    global_batch: int = 256
    lr: float = 1e-4
    min_lr: float = 1e-5
    warmup_steps: int = 20
    weight_decay: float = 0.1
    clip_grad: float = 1.0
    precision: str = "bf16"  # or "fp32"
    fp8: str = "none"  # of Transformer Engine's products: hybrid (e4m3 forward, e5m2 backward) or e4m3
    fp8_recipe: str = "delayed"  # how its scales are found: delayed, tensorwise, blockwise or mxfp8
    aux_loss: float = 1e-2
    validation: float = 0.01  # share of the documents
    eval_interval: int = 100
    eval_steps: int = 10
    save_interval: int = 100
    keep_checkpoints: int = 2  # the newest so many; two at least
    async_save: bool = False  # write checkpoints while training goes on
    log_interval: int = 1
    seed: int = 1234
    recompute: str = "none"  # of activations: none, selective (attention's scores) or full (all but layers' inputs)
    virtual_pipeline: int = 1  # chunks of layers that each pipeline stage works on in turn
    first_stage_layers: int = 0  # of the first pipeline stage; 0: as many as the others
    last_stage_layers: int = 0
    overlap_grad_reduce: bool = True  # while the backward pass still runs
    overlap_param_gather: bool = True  # while the forward pass already runs
    capacity_factor: float = 0.0  # an expert takes so many times its even share of tokens; 0: all that come
    pad_to_capacity: bool = False  # and always as many, so that shapes never change
    drop_policy: str = "probs"  # who is dropped: the least probable, or by position
    z_loss: float = 0.0
    router_fp32: bool = False
    freeze_router: bool = False
    max_skipped: int = 5  # updates skipped in a row before the run gives up
    spike: float = 0.0  # skip an update whose gradient norm is so many times the usual one; 0: none
    replica_check_interval: int = 100  # steps between comparisons of data-parallel replicas; 0: none
    setup_timeout: int = 1800  # seconds up to the end of the first step
    step_timeout: int = 600
    save_timeout: int = 1800
    tensorboard: bool = False
    wandb_project: str = ""
    packing: str | None = None  # stream, documents or none; None: documents where the data has a mask
    lora: int = 0  # rank of the adapters that are trained in place of the whole model, if any
    lora_alpha: float = 0.0  # their weight is alpha / rank; 0: twice the rank
    lora_experts: bool = False  # adapt the experts, too
    lora_dropout: float = 0.0


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer prompts over HTTP."""

    model: str  # a converted folder, or a run whose newest checkpoint to serve
    layout: Layout = field(default_factory=Layout)
    host: str = "127.0.0.1"
    port: int = 5000  # 0 takes any free one
    other_port: bool = False  # take the next free one where that one is taken
    precision: str = "bf16"
    fp8_experts: bool = False  # keep experts' weights in FP8: half the memory, and half of what a token reads
    max_batch: int = 64
    max_tokens: int = 4096  # prompt and answer together; a model with a shorter context serves that
    queue: int = 256  # requests that may wait beyond those that run; more are told to come back
    queue_tokens: int = 524288  # that those may come to, prompts and answers
    drain_seconds: float = 20.0  # how long answers may take to end after SIGTERM
    name: str | None = None  # what clients call the model; None: its folder's name
    base: str | None = None  # of a run of adapters: where its base is, if not where it was
    engine: str = "megatron"  # or "vllm"
    exports: str | None = None  # the folder for what vLLM needs exported to the hub's layout


JOBS: dict[str, type] = {
    "tiny": TinyConfig,
    "download": DownloadConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
    "verify": VerifyConfig,
    "finetune": FinetuneConfig,
    "serve": ServeConfig,
}


# What numbers make sense, by name, of whichever job; none is below 0. The launcher's settings say the same.
AT_LEAST = {
    **dict.fromkeys(("tensor", "pipeline", "expert", "expert_tensor", "context"), 1),
    **dict.fromkeys(("layers", "hidden", "intermediate", "heads", "kv_heads", "experts", "top_k"), 1),
    **dict.fromkeys(("max_positions", "shards", "make_vocab_size_divisible_by", "max_batch", "max_tokens"), 1),
    **dict.fromkeys(("steps", "sequence_length", "micro_batch", "global_batch", "virtual_pipeline"), 1),
    **dict.fromkeys(("eval_interval", "save_interval", "log_interval", "max_skipped"), 1),
    **dict.fromkeys(("setup_timeout", "step_timeout", "save_timeout"), 1),
    "keep_checkpoints": 2,
}
AT_MOST = {"validation": 1, "lora_dropout": 1, "seed": 2**31 - 1}


def load(job: str, path: Path) -> Any:
    """Read `path` as the configuration of `job`; `InputError` names the key and lists the valid ones."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from error
    return parse(JOBS[job], raw or {}, where=str(path))


def parse(cls: type[T], raw: Any, *, where: str) -> T:
    """Strict mapping -> dataclass: every key known, every required one there, every value of its type."""
    if not isinstance(raw, dict):
        raise InputError(f"{where}: expected a mapping, got {type(raw).__name__}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if unknown := sorted(set(raw) - set(fields)):
        raise InputError(f"{where}: unknown {', '.join(map(str, unknown))}; valid: {', '.join(fields)}")
    missing = [
        n
        for n, f in fields.items()
        if n not in raw and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise InputError(f"{where}: {', '.join(missing)} missing")
    hints = get_type_hints(cls)
    values = {name: _value(hints[name], value, where=f"{where}: {name}") for name, value in raw.items()}
    for name, value in values.items():
        if isinstance(value, (int, float)):
            _check_range(name, value, where)
    return cls(**values)


def _check_range(name: str, value: float, where: str) -> None:
    least, most = AT_LEAST.get(name, 0), AT_MOST.get(name, math.inf)
    if not -math.inf < value < math.inf:  # which NaN isn't either
        raise InputError(f"{where}: {name}: {value} isn't a number")
    if not least <= value <= most:
        span = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise InputError(f"{where}: {name}: {value} must be {span}")


def _value(hint: Any, value: Any, *, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return parse(hint, value, where=where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    allowed = get_args(hint) if get_origin(hint) is not list else (hint,)
    kinds = tuple(get_origin(kind) or kind for kind in allowed or (hint,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds)
        raise InputError(f"{where}: {value!r} isn't {names}")
    return value
