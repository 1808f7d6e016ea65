"""What each job is told: one frozen dataclass per job, whose fields are the keys of its `config.yaml`.

A field says everything about its option, so that a new one is added here and where it does its work.
"""

from dataclasses import dataclass
from typing import Any

from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.options import LARGEST_SEED, option, options, planned

MISTRAL = "mistral"  # mistral-common's format, in place of a chat template
# How the server reads prompts and keeps its cache: planning reckons with what the engine does.
PAGE = 256  # tokens of the cache that come and go together
PROMPT_STEP = 2048  # tokens that are read at once; longer prompts are read in parts
CACHE_SHARE = 0.85  # of what the weights leave of a GPU's memory

PRECISION: dict[str, Any] = {"choices": ("bf16", "fp32"), "help": "Precision of the arithmetic."}
DTYPES = ("bfloat16", "float16", "float32")
BASE: dict[str, Any] = {"default": None, "help": "Base weights of a run of adapters, if they were moved."}
CAPACITY = ("capacity_factor", "has an effect only with {capacity_factor}")
LEGACY = ("format", "has an effect only with {format} legacy")
LORA = ("lora", "has an effect only with {lora} RANK")


@dataclass(frozen=True, kw_only=True)
class TinyConfig:
    """Make a small Mixtral with random weights in the hub's own layout."""

    output: str = planned("Folder to write.")
    layers: int = option(4, least=1, help="Transformer layers.")
    hidden: int = option(256, least=1, help="Width of the model.")
    intermediate: int = option(512, least=1, help="Width of an expert.")
    heads: int = option(8, least=1, help="Attention heads.")
    kv_heads: int = option(2, least=1, help="Query groups.")
    experts: int = option(8, least=1, help="Experts a layer.")
    top_k: int = option(2, least=1, help="Experts a token.")
    max_positions: int = option(4096, least=1, help="Longest sequence.")
    dtype: str = option("bfloat16", choices=DTYPES, help="Precision of the weights.")
    shards: int = option(2, least=1, help="Safetensors files.")
    seed: int = option(1234, most=LARGEST_SEED, help="Seed of the random weights.")


@dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetch a repository from the hub."""

    repo: str = planned("Repository of the hub, OWNER/NAME.", "REPO")
    output: str = planned("Where to.")
    revision: str | None = planned("Branch, tag or commit.", default=None)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turn text into Megatron's `.bin`/`.idx`."""

    inputs: list[str] = planned("Files of text or conversations.", "FILES")
    output: str = planned("Prefix of the two files, OUTPUT.bin and OUTPUT.idx.")
    tokenizer: str = planned("A folder in the hub's layout, or a tokenizer.model.", "--model")
    workers: int = option(0, help="Processes that tokenize; 0 means one for each core.")
    text_key: str = option("text", help="Key of plain text in a JSON line.")
    messages_key: str = option("messages", help="Key of a conversation.")
    prompt_key: str = option("prompt", help="Key of a prompt that has a completion.")
    completion_key: str = option("completion", help="Key of the completion.")
    chat_template: str | None = option(
        None, help="Chat template: a Jinja file, or mistral. The default is the model's own."
    )
    format: str | None = option(
        None,
        choices=("messages", "sharegpt", "alpaca", "prompt", "openorca", "text", "ids"),
        help="Format of the rows; recognised unless given.",
    )
    ignore_fields: str = option("", help="Fields to leave out of every row, separated by commas.")
    max_bad: int = option(0, help="Number of bad lines that are skipped before the job fails.")
    show: int = option(0, help="Number of documents to print with their loss mask.")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn weights between the hub's layout and Megatron's, or adapters into PEFT's."""

    source: str = planned("The weights to convert.", "--model")
    output: str = planned("Where to.")
    to: str = planned("Layout to write.", default="megatron", choices=("megatron", "hf", "peft"))
    layout: Layout = planned("Of legacy files, which there is one of for each rank.", "--tp ...", default=Layout)
    dtype: str | None = option(None, choices=DTYPES, help="Data type to write. The default is the source's.")
    format: str = option(
        "torch_dist",
        choices=("torch_dist", "legacy"),
        typed="--layout",
        help="Megatron's format: torch_dist loads at every parallel layout, legacy (mp_rank_XX) at one.",
    )
    names: str = option(
        "te-grouped",
        choices=("te-grouped", "te", "local"),
        needs=LEGACY,
        help="Layers whose parameter names legacy files have.",
    )
    make_vocab_size_divisible_by: int = option(
        128, least=1, needs=LEGACY, help="Legacy files pad the vocabulary to a multiple of this times TP."
    )
    base: str | None = option(**BASE)
    verify: bool = option(False, help="Read the output back and compare it with the source.")
    check_finite: bool = option(False, help="Refuse NaN and infinity.")
    check_logits: bool = option(False, help="Compare the logits of a prompt with those of transformers.")
    prompt: str = option("The mixture of experts sends every token to two of eight.", help="That prompt.")
    tolerance: float = option(1e-3, help="Largest accepted difference, relative to the largest logit.")
    max_shard_gb: float = option(5.0, help="Size limit of a file in the hub's layout, GB.")


@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """Recompute the digests of a converted folder."""

    folder: str = planned("The converted folder.", "DIR")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train; values unless given are those of upstream's Mixtral example."""

    model: str = planned("A converted folder, or a run whose newest checkpoint to start from.")
    data: str | list[str] = planned("The prefix that `prepare` wrote, or several to blend, PREFIX:WEIGHT.")
    layout: Layout = planned("How the model lies over the ranks.", "--tp ...", default=Layout)
    steps: int = option(500, least=1, help="Optimizer steps.")
    sequence_length: int = option(4096, least=1, help="Tokens a sequence.")
    micro_batch: int = option(1, least=1, help="Sequences that a rank computes at once.")
    global_batch: int = option(256, least=1, help="Sequences a step, over all ranks.")
    lr: float = option(1e-4, help="Peak learning rate.")
    min_lr: float = option(1e-5, help="Learning rate at the end.")
    warmup_steps: int = option(20, help="Steps of linear warm-up.")
    weight_decay: float = option(0.1, help="AdamW's weight decay.")
    clip_grad: float = option(1.0, help="Largest gradient norm; 0 turns clipping off.")
    precision: str = option("bf16", **PRECISION)
    fp8: str = option("none", choices=("none", "hybrid", "e4m3"), help="Matmuls in FP8 by Transformer Engine.")
    fp8_recipe: str = option(
        "delayed",
        choices=("delayed", "tensorwise", "blockwise", "mxfp8"),
        needs=("fp8", "has an effect only with {fp8}"),
        help="How FP8 scales are computed.",
    )
    aux_loss: float = option(1e-2, help="Weight of the load-balancing loss.")
    validation: float = option(0.01, most=1, help="Share of the documents kept for validation.")
    eval_interval: int = option(100, least=1, help="Steps between evaluations.")
    eval_steps: int = option(10, help="Batches an evaluation.")
    save_interval: int = option(100, least=1, help="Steps between checkpoints.")
    keep_checkpoints: int = option(2, least=2, help="Newest checkpoints to keep.")
    async_save: bool = option(False, help="Write checkpoints while training goes on.")
    log_interval: int = option(1, least=1, help="Steps between lines of the log.")
    seed: int = option(1234, most=LARGEST_SEED, help="Seed of the data's order.")
    recompute: str = option(
        "none",
        choices=("none", "selective", "full"),
        help="Activations to recompute in the backward pass instead of keeping them.",
    )
    virtual_pipeline: int = option(
        1, least=1, help="Chunks of layers for each pipeline stage (interleaved schedule)."
    )
    first_stage_layers: int = option(0, help="Layers of the first pipeline stage; 0 means as many as the others.")
    last_stage_layers: int = option(0, help="Layers of the last pipeline stage; 0 means as many as the others.")
    overlap_grad_reduce: bool = option(True, help="Sum gradients while the backward pass still runs.")
    overlap_param_gather: bool = option(True, help="Gather parameters while the forward pass already runs.")
    capacity_factor: float = option(
        0.0,
        help="Most tokens of an expert, relative to its even share; further tokens are dropped; 0 means no limit.",
    )
    pad_to_capacity: bool = option(
        False, needs=CAPACITY, help="Pad every expert's tokens to its capacity, so that shapes never change."
    )
    drop_policy: str = option(
        "probs",
        choices=("probs", "position"),
        needs=CAPACITY,
        help="Which tokens a full expert drops: the least probable ones, or the last ones.",
    )
    z_loss: float = option(0.0, help="Weight of the router's z-loss.")
    router_fp32: bool = option(False, help="Route in fp32.")
    freeze_router: bool = option(False, help="Don't train the routers.")
    max_skipped: int = option(5, least=1, help="Updates skipped in a row before the run ends.")
    spike: float = option(
        0.0, help="Skip an update whose gradient norm is this many times the usual one; 0 turns this off."
    )
    replica_check_interval: int = option(
        100, help="Steps between comparisons of data-parallel replicas; 0 turns them off."
    )
    setup_timeout: int = option(1800, least=1, help="Seconds that loading and the first step may take.")
    step_timeout: int = option(600, least=1, help="Seconds that a step may take.")
    save_timeout: int = option(1800, least=1, help="Seconds that a save may take.")
    tensorboard: bool = option(False, help="Write TensorBoard's files into the run directory.")
    wandb_project: str = option("", help="Project of Weights & Biases to report to, with WANDB_API_KEY.")
    packing: str | None = option(
        None,
        choices=("stream", "documents", "none"),
        help="How documents make sequences: end to end, whole without seeing each other (chats unless given), or "
        "one each.",
    )
    lora: int = option(
        0, help="Rank of the adapters to train instead of the whole model; 0 trains the whole model."
    )
    lora_alpha: float = option(
        0.0, needs=LORA, help="Scale of the adapters: their weight is alpha / rank. 0 means twice the rank."
    )
    lora_experts: bool = option(False, needs=LORA, help="Adapt the experts as well as the attention.")
    lora_dropout: float = option(0.0, most=1, needs=LORA, help="Dropout of an adapter's input.")


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Answer prompts over HTTP."""

    model: str = planned("A converted folder, or a run whose newest checkpoint to serve.")
    layout: Layout = planned("How the model lies over the ranks.", "--tp ...", default=Layout)
    host: str = planned("Address to listen on.", default="127.0.0.1")
    port: int = planned("Port to listen on; 0 takes any free one.", default=5000, most=65535)
    other_port: bool = planned("Take the next free one where that one is taken.", "no --port", default=False)
    engine: str = option(
        "megatron", choices=("megatron", "vllm"), help="The engine: ours on megatron-core, or `vllm serve`."
    )
    precision: str = option("bf16", **PRECISION)
    fp8_experts: bool = option(
        False, help="Keep the experts' weights in FP8: half the memory, with rounding errors."
    )
    max_batch: int = option(64, least=1, help="Requests answered at once.")
    max_tokens: int = option(4096, least=2, help="Most tokens of a prompt and its answer together.")
    queue: int = option(256, help="Further requests that may wait.")
    queue_tokens: int = option(524288, help="Most tokens of all waiting requests.")
    drain_seconds: float = option(20.0, help="Seconds that running answers get to finish when the server stops.")
    name: str | None = option(
        None, typed="--served-name", help="Name of the model for clients. The default is its folder's name."
    )
    base: str | None = option(**BASE)
    exports: str | None = planned("Where vLLM's exports in the hub's layout go.", "the models folder", default=None)


JOBS: dict[str, type] = {
    "tiny": TinyConfig,
    "download": DownloadConfig,
    "prepare": PrepareConfig,
    "convert": ConvertConfig,
    "verify": VerifyConfig,
    "finetune": FinetuneConfig,
    "serve": ServeConfig,
}


def flag_of(field: str, job: type | None = None) -> str:
    """The option of the command line that fills a field of `job`, or of a layout or any job; else `--FIELD`."""
    kinds = [job] if job else []
    known = next(
        (options(kind)[field] for kind in (*kinds, Layout, *JOBS.values()) if field in options(kind)), None
    )
    return known.flag if known else "--" + field.replace("_", "-")
