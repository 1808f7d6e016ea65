"""The settings of every job, one line each: the CLI makes its options of them and plans check them.

Names and defaults are those of the job's configuration; a test holds the two together.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.common import quoting
from launcher.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One key of a job's configuration. `default` is what the job does when the key is absent."""

    name: str
    help: str
    default: Any
    kind: type[int] | type[float] | type[str] | type[bool] = int
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    typed: str = ""  # the option, where the name's own is taken

    @property
    def option(self) -> str:
        """As typed: `--micro-batch`."""
        return self.typed or "--" + self.name.replace("_", "-")

    def checked(self, value: Any) -> Any:
        """`value` in this setting's type; `UsageError` naming the option and what is valid."""
        if self.kind is str:
            return self._checked_text(value)
        if self.kind is bool:
            if not isinstance(value, bool):
                raise UsageError(f"{self.option}: {value!r} isn't true or false")
            return value
        try:
            number = int(value) if self.kind is int else float(value)
            if not math.isfinite(number) or (self.kind is int and not -LARGEST < number < LARGEST):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            expected = "a whole number" if self.kind is int else "a number"
            raise UsageError(f"{self.option}: {value!r} isn't {expected}") from None
        low, high = self.minimum, self.maximum
        if not (low is None or number >= low) or not (high is None or number <= high):
            span = f"at least {low:g}" if high is None else f"between {low:g} and {high:g}"
            raise UsageError(f"{self.option}: {number} must be {span}")
        return number

    def _checked_text(self, value: Any) -> str:
        if self.choices and value not in self.choices:
            raise UsageError(f"{self.option}: {value!r} isn't one of {', '.join(self.choices)}")
        return quoting.checked(str(value), self.option)


def _int(name: str, default: int | None, help: str, minimum: int = 1, maximum: int | None = None) -> Setting:
    return Setting(name=name, default=default, help=help, minimum=minimum, maximum=maximum)


def _float(name: str, default: float, help: str, maximum: float | None = None) -> Setting:
    return Setting(name=name, default=default, help=help, kind=float, minimum=0, maximum=maximum)


def _text(name: str, default: str, help: str) -> Setting:
    return Setting(name=name, default=default, help=help, kind=str)


def _flag(name: str, help: str) -> Setting:
    return Setting(name=name, default=False, help=help, kind=bool)


def _on(name: str, help: str) -> Setting:
    return Setting(name=name, default=True, help=help, kind=bool)


def _choice(name: str, default: str | None, help: str, *choices: str) -> Setting:
    return Setting(name=name, default=default, help=help, kind=str, choices=choices)


_BASE = Setting(
    name="base",
    default=None,
    kind=str,
    help="Where the base of a run of adapters is, if not where it was.",
)
LARGEST = 2**63  # what no counter of a job holds
LARGEST_SEED = 2**31 - 1
MODEL = "mistralai/Mixtral-8x7B-v0.1"  # what every job works on unless told otherwise

SETTINGS: dict[str, tuple[Setting, ...]] = {
    "tiny": (
        _int("layers", 4, "Transformer layers."),
        _int("hidden", 256, "Width of the model."),
        _int("intermediate", 512, "Width of an expert."),
        _int("heads", 8, "Attention heads."),
        _int("kv_heads", 2, "Query groups."),
        _int("experts", 8, "Experts a layer."),
        _int("top_k", 2, "Experts a token."),
        _int("max_positions", 4096, "Longest sequence."),
        _choice("dtype", "bfloat16", "Precision of the weights.", "bfloat16", "float16", "float32"),
        _int("shards", 2, "Safetensors files."),
        _int("seed", 1234, "Seed of the random weights.", 0, LARGEST_SEED),
    ),
    "download": (),
    "prepare": (
        _int("workers", 0, "Processes that tokenize; 0 is one a core.", 0),
        _text("text_key", "text", "Key of plain text in a JSON line."),
        _text("messages_key", "messages", "Key of a conversation."),
        _text("prompt_key", "prompt", "Key of a prompt, whose answer is learnt."),
        _text("completion_key", "completion", "Key of that answer."),
        Setting(
            name="chat_template",
            default=None,
            kind=str,
            help="Jinja file that writes conversations, or mistral; the model's own unless given.",
        ),
        _int("max_bad", 0, "Bad lines to leave out before giving up.", 0),
        _int("show", 0, "Documents to print with their mask.", 0),
    ),
    "convert": (
        _choice("dtype", None, "Precision to write; the source's unless given.", "bfloat16", "float16", "float32"),
        Setting(
            name="format",
            typed="--layout",
            default="torch_dist",
            kind=str,
            choices=("torch_dist", "legacy"),
            help="Megatron's files: for every layout, or mp_rank_XX of one.",
        ),
        _choice("names", "te-grouped", "Whose parameters legacy files name.", "te-grouped", "te", "local"),
        _int("make_vocab_size_divisible_by", 128, "What legacy files pad the vocabulary to, times TP."),
        _BASE,
        _flag("verify", "Read what was written back and compare."),
        _flag("check_finite", "Refuse NaN and infinity."),
        _flag("check_logits", "Compare the logits of a prompt with transformers'."),
        _text("prompt", "The mixture of experts sends every token to two of eight.", "That prompt."),
        _float("tolerance", 1e-3, "Largest difference, in sizes of the largest logit."),
        _float("max_shard_gb", 5.0, "Largest file of the hub's layout, GB."),
    ),
    "verify": (),
    "finetune": (
        _int("steps", 500, "Optimizer steps."),
        _int("sequence_length", 4096, "Tokens a sequence."),
        _int("micro_batch", 1, "Sequences a rank takes at once."),
        _int("global_batch", 256, "Sequences a step, over all ranks."),
        _float("lr", 1e-4, "Peak learning rate."),
        _float("min_lr", 1e-5, "Learning rate at the end."),
        _int("warmup_steps", 20, "Steps of linear warm-up.", 0),
        _float("weight_decay", 0.1, "AdamW's weight decay."),
        _float("clip_grad", 1.0, "Largest gradient norm; 0 doesn't clip."),
        _choice("precision", "bf16", "Precision of the arithmetic.", "bf16", "fp32"),
        _choice("fp8", "none", "Products in FP8 by Transformer Engine.", "none", "hybrid", "e4m3"),
        _choice(
            "fp8_recipe",
            "delayed",
            "How its scales are found.",
            *("delayed", "tensorwise", "blockwise", "mxfp8"),
        ),
        _float("aux_loss", 1e-2, "Weight of the load-balancing loss."),
        _float("validation", 0.01, "Share of the documents kept for validation.", 1),
        _int("eval_interval", 100, "Steps between evaluations."),
        _int("eval_steps", 10, "Batches an evaluation.", 0),
        _int("save_interval", 100, "Steps between checkpoints."),
        _int("keep_checkpoints", 2, "Newest checkpoints to keep.", 2),
        _flag("async_save", "Write checkpoints while training goes on."),
        _int("log_interval", 1, "Steps between lines of the log."),
        _int("seed", 1234, "Seed of the data's order.", 0, LARGEST_SEED),
        _choice("recompute", "none", "Activations to compute again, not keep.", "none", "selective", "full"),
        _int("virtual_pipeline", 1, "Chunks of layers that each pipeline stage works on in turn: interleaving."),
        _int("first_stage_layers", 0, "Layers of the first pipeline stage; 0 is as many as the others.", 0),
        _int("last_stage_layers", 0, "Layers of the last one.", 0),
        _on("overlap_grad_reduce", "Sum gradients while the backward pass still runs."),
        _on("overlap_param_gather", "Gather parameters while the forward pass already runs."),
        _float("capacity_factor", 0.0, "Tokens an expert takes, in even shares; the rest is dropped; 0 is all."),
        _flag("pad_to_capacity", "Give every expert always as many tokens."),
        _choice(
            "drop_policy", "probs", "Whom an expert drops: the least probable, or by position.", "probs", "position"
        ),
        _float("z_loss", 0.0, "Weight of the router's z-loss."),
        _flag("router_fp32", "Route in fp32."),
        _flag("freeze_router", "Leave the routers as they are."),
        _int("max_skipped", 5, "Updates skipped in a row before the run gives up."),
        _float("spike", 0.0, "Skip an update whose gradient norm is so many times the usual one; 0 is none."),
        _int("replica_check_interval", 100, "Steps between comparisons of data-parallel replicas; 0 is none.", 0),
        _int("setup_timeout", 1800, "Seconds that loading and the first step may take."),
        _int("step_timeout", 600, "Seconds that a step may take."),
        _int("save_timeout", 1800, "Seconds that a save may take."),
        _flag("tensorboard", "Write TensorBoard's files into the run directory."),
        _text("wandb_project", "", "Project of Weights & Biases to report to, with WANDB_API_KEY."),
        _choice(
            "packing",
            None,
            "How documents make sequences: end to end, whole without seeing each other (chats unless given), "
            "or one each.",
            *("stream", "documents", "none"),
        ),
        _int("lora", 0, "Rank of adapters to train in place of the whole model; 0 is none.", 0),
        _float("lora_alpha", 0.0, "Their weight is this over the rank; 0 is twice the rank."),
        _flag("lora_experts", "Adapt the experts as well as the attention."),
        _float("lora_dropout", 0.0, "Dropout of what goes into an adapter.", 1),
    ),
    "serve": (
        _choice("engine", "megatron", "What answers: our own, or `vllm serve` in its place.", "megatron", "vllm"),
        _choice("precision", "bf16", "Precision of the arithmetic.", "bf16", "fp32"),
        _flag("fp8_experts", "Keep experts' weights in FP8: half the memory, at some loss."),
        _int("max_batch", 64, "Requests answered at once."),
        _int("max_tokens", 4096, "Longest prompt and answer together."),
        _int("queue", 256, "Requests that may wait beyond those.", 0),
        _int("queue_tokens", 524288, "Tokens that those may come to.", 0),
        _float("drain_seconds", 20.0, "How long answers may take to end when the server is told to."),
        Setting(
            name="name",
            typed="--served-name",
            default=None,
            kind=str,
            help="What clients call the model; its folder's name unless given.",
        ),
        _BASE,
    ),
}


def check(job: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with each in its setting's type; `UsageError` names an unknown one and its nearest neighbour."""
    known = {setting.name: setting for setting in SETTINGS[job]}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"{job} has no setting {name!r}; {hint}Valid: {', '.join(known) or 'none'}")
    return {name: known[name].checked(value) for name, value in values.items()}


def complete(job: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` and what the job does where they say nothing."""
    return {setting.name: setting.default for setting in SETTINGS[job]} | dict(values)
