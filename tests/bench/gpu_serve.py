"""Serving speed of the whole Mixtral 8x7B with random weights at any layout, and what bounds and rivals it.

Decoding is timed over the engine's own steps, sampling and bookkeeping included; `all` counts from the first prompt
to the last token, prompts included. The floor of a step is the bytes that must be read once over the copy rate
measured in the same run. The same weights are served once more with experts in FP8; how far their logits are from
those in bf16 is told beside how far these are from themselves when fewer requests are answered at once.
`torchrun --nproc-per-node 2 tests/bench/gpu_serve.py --layout tensor=2` is for two GPUs; `--rival vllm` wants vLLM
in the folder `--vllm` and measures it by `gpu_vllm.py` afterwards, in the same run.
"""

import argparse
import dataclasses
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_candidates import SHAPE as TWO_LAYERS

from megatron_mixtral import kernels as fused
from megatron_mixtral import mcore
from megatron_mixtral.mcore import ranks
from megatron_mixtral.model import build as model
from megatron_mixtral.model import fp8
from megatron_mixtral.serve.engine.replica import Replica, Sizes, missing
from megatron_mixtral.serve.engine.sampling import Choice
from megatron_mixtral.serve.messages import Request
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape

PROMPT, ANSWER = 128, 128
COMPARED, FORCED = 32, 8  # requests whose logits are compared, and tokens of each
KINDS = {"bf16": "mixlaunch", "fp8": "mixlaunch_fp8"}  # of the experts' weights -> its part of the report


def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return 2 * source.nbytes / (statistics.median(a.elapsed_time(b) for a, b in times) / 1000)


def step_bytes(shape: MixtralShape, batch: int, context: int, expert_bytes: int) -> float:
    """What one decoding step reads at least: the weights that some token needs, and all keys and values."""
    heads = shape.num_attention_heads * shape.head_dim
    cached = shape.num_key_value_heads * shape.head_dim
    attention = shape.hidden_size * (2 * heads + 2 * cached)
    taken = 1 - (1 - shape.num_experts_per_tok / shape.num_local_experts) ** batch
    experts = taken * shape.num_local_experts * 3 * shape.hidden_size * shape.intermediate_size
    dense = shape.num_hidden_layers * attention + shape.hidden_size * shape.vocab_size
    kept = batch * context * 2 * cached * shape.num_hidden_layers
    return 2 * (dense + kept) + expert_bytes * shape.num_hidden_layers * experts


def layout_of(text: str, world: int) -> Layout:
    """`tensor=2,expert=2`; experts are cut as tensors are where nothing else is said, and one GPU needs nothing."""
    sizes = {name: int(size) for name, _, size in (part.partition("=") for part in text.split(",") if part)}
    if not sizes:
        sizes = {"tensor": world}
    if not {"expert", "expert_tensor"} & set(sizes):
        sizes["expert_tensor"] = sizes.get("tensor", 1)
    return Layout(**sizes)


def build(shape: MixtralShape, layout: Layout, *, in_fp8: bool) -> torch.nn.Module:
    """With the same random weights every time; what every rank holds is the same on all."""
    part = model.build(shape, layout, precision="bf16", random_weights=False, fp8_experts=in_fp8)
    scales = {}
    for experts in (layer.mlp.experts for layer in part.decoder.layers):
        scales |= {experts.linear_fc1: experts.scales[0], experts.linear_fc2: experts.scales[1]}
    with torch.no_grad():
        for index, parameter in enumerate(part.parameters()):
            own = getattr(parameter, "tensor_model_parallel", False) or parameter.ndim == 3
            torch.manual_seed(1234 + index + 100_000 * torch.distributed.get_rank() * own)
            if parameter.ndim == 1:
                parameter.fill_(1.0)
                continue
            scale = scales.get(parameter)
            for number, matrix in enumerate(parameter if parameter.ndim == 3 else [parameter]):
                drawn = torch.empty_like(matrix, dtype=torch.bfloat16).normal_(0.0, shape.initializer_range)
                matrix.copy_(drawn) if scale is None else fp8.quantize(drawn, matrix, scale[number])
    return part


def request(number: int, length: int, tokens: int) -> Request:
    generator = torch.Generator().manual_seed(number)
    prompt = torch.randint(3, 32000, (length,), generator=generator).tolist()
    return Request(id=number, prompt=prompt, max_tokens=tokens, seed=number, temperature=0.0)


class Numbers:
    """Requests need ids that were never used."""

    def __init__(self) -> None:
        self.last = 0

    def take(self, count: int) -> range:
        self.last += count
        return range(self.last - count, self.last)


def decoding(replica: Replica, numbers: Numbers, batch: int, answer: int = ANSWER) -> dict[str, float]:
    """All requests at once: the rate of steps in which all decode, and of the whole."""
    for number in numbers.take(batch):
        replica.add(request(number, PROMPT, answer))
    torch.cuda.synchronize()
    begun, steps = time.perf_counter(), []
    while replica.busy:
        before = time.perf_counter()
        events = replica.step()
        steps.append((time.perf_counter() - before, len(events)))
    whole = time.perf_counter() - begun
    full = [seconds for seconds, tokens in steps if tokens == batch]
    step = statistics.median(full[2:] or full)
    return {
        "step_ms": step * 1000,
        "tokens_per_s": batch / step,
        "all_tokens_per_s": batch * answer / whole,
    }


def first_token(replica: Replica, numbers: Numbers, length: int, repeats: int) -> float:
    """Seconds from a prompt to its first token, on an idle engine."""
    times = []
    for number in numbers.take(repeats + 2):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        replica.add(request(number, length, 1))
        while replica.busy:
            replica.step()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[2:])


def logits(replica: Replica, numbers: Numbers, at_once: int) -> torch.Tensor:
    """[requests * tokens, V] of always the same answers, forced upon it, so many requests at a time."""
    sampler, seen = replica.engine.sampler, []
    for first in range(0, COMPARED, at_once):
        taken = numbers.take(at_once)
        steps: dict[int, list[torch.Tensor]] = {number: [] for number in taken}

        def forced(
            rows: torch.Tensor, asked: list[int], steps: Any = steps, shift: int = first - taken[0]
        ) -> list[Choice]:
            for number, row in zip(asked, rows.float().cpu(), strict=True):
                steps[number].append(row)
            return [Choice(3 + (31 * (number + shift) + 7 * len(steps[number])) % 31000) for number in asked]

        sampler.choose = forced  # type: ignore[method-assign]
        for number in taken:
            asked = request(first + number - taken[0], PROMPT, FORCED)
            replica.add(dataclasses.replace(asked, id=number, logprobs=0))  # so that the host draws
        while replica.busy:
            replica.step()
        seen += [row for number in taken for row in steps[number]]
    del sampler.choose
    return torch.stack(seen)


def apart(some: torch.Tensor, exact: torch.Tensor) -> dict[str, float]:
    """How far logits [N, V] are from others."""
    p, q = exact.log_softmax(-1), some.log_softmax(-1)
    return {
        "relative_error": float((some - exact).norm() / exact.norm()),
        "kl": float(F.kl_div(q, p, log_target=True, reduction="batchmean")),
        "same_first_choice": float((some.argmax(-1) == exact.argmax(-1)).float().mean()),
    }


def ours(
    options: argparse.Namespace, shape: MixtralShape, rate: float, *, in_fp8: bool
) -> tuple[dict[str, Any], torch.Tensor]:
    """What was measured, and logits to compare."""
    part, profile = build(shape, options.layout, in_fp8=in_fp8), options.profiles
    if reason := missing(part):
        sys.exit(f"our own engine can't serve this layout: {reason}")
    begun = time.perf_counter()
    replica = Replica(
        part, Sizes(requests=max(options.batches), context_tokens=2048, step_tokens=options.step_tokens)
    )
    forward = replica.engine.forward
    found: dict[str, Any] = {
        "ready_s": time.perf_counter() - begun,
        "cache_gib": forward.cache.nbytes / 2**30,
        "allocated_gib": torch.cuda.memory_allocated() / 2**30,
        "decoding": {},
    }
    numbers = Numbers()
    kept = logits(replica, numbers, COMPARED)
    found["logits_of_fewer_at_once"] = apart(logits(replica, numbers, 4), kept)
    decoding(replica, numbers, 1, 8)
    found["first_token_ms"] = {n: first_token(replica, numbers, n, 5) * 1000 for n in (128, 1024)}
    print("first token, ms", found["first_token_ms"], flush=True)
    for batch in options.batches:
        share = max(1, batch // ranks.data_parallel()[1])  # each replica's; their rates add up
        decoding(replica, numbers, share, 24)
        result = decoding(replica, numbers, share)
        result |= {key: value * batch / share for key, value in result.items() if "tokens" in key}
        floor = step_bytes(shape, batch, PROMPT + ANSWER // 2, 1 if in_fp8 else 2) / rate
        floor /= torch.distributed.get_world_size() // options.layout.pipeline
        result |= {"floor_ms": floor * 1000, "floor_tokens_per_s": batch / floor}
        found["decoding"][batch] = result
        print(batch, {k: round(v, 2) for k, v in result.items()}, flush=True)
    if profile:
        profile.mkdir(parents=True, exist_ok=True)
        kind = "_fp8" if in_fp8 else ""
        kind += f"_rank{torch.distributed.get_rank()}" if torch.distributed.get_world_size() > 1 else ""
        for size in (1, max(options.batches)):
            write_profile(forward.graphs[size].replay, profile / f"decode_{size}{kind}.txt")
        path = profile / f"prompt_1024_three_times{kind}.txt"
        write_profile(lambda: first_token(replica, numbers, 1024, 1), path)
    for tensor in (forward.cache, *part.parameters()):
        tensor.untyped_storage().resize_(0)  # whoever still holds them: the rival needs the room
    return found, kept


def write_profile(run: Callable[[], Any], path: Path) -> None:
    """Kernel times of one call, longest first, to a text file."""
    from torch.profiler import ProfilerActivity

    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            kernels.setdefault(event.name, []).append(event.self_device_time_total)
    total = sum(map(sum, kernels.values()))
    lines = [f"{total / 1000:.2f} ms in kernels"]
    for name, times in sorted(kernels.items(), key=lambda item: -sum(item[1])):
        lines.append(f"{sum(times) / 1000:9.3f} ms {sum(times) / total:6.1%} {len(times):5d} x  {name[:150]}")
    path.write_text("\n".join(lines) + "\n")


def transformers(options: argparse.Namespace, shape: MixtralShape) -> dict[str, Any]:
    """Its `generate`, greedy, all prompts of one length, with the faster of its two ways through the experts."""
    import transformers as library

    config = library.MixtralConfig(
        **{f.name: getattr(shape, f.name) for f in dataclasses.fields(shape) if f.name != "rope_theta"},
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    with torch.device("cuda"):
        part = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    found: dict[str, Any] = {"decoding": {}}
    for batch in options.batches:
        for way in ("grouped_mm", "eager"):
            part.eval().set_experts_implementation(way)
            try:
                step = generate_step(part, batch)
            except torch.OutOfMemoryError:  # its grouped way copies the experts of every token
                clean()
                continue
            if batch not in found["decoding"] or step * 1000 < found["decoding"][batch]["step_ms"]:
                found["decoding"][batch] = {"step_ms": step * 1000, "tokens_per_s": batch / step, "way": way}
    return found


def generate_step(part: Any, batch: int) -> float:
    """Seconds for one more token of each of `batch` answers."""
    ids = torch.tensor([request(n, PROMPT, 1).prompt for n in range(batch)], device="cuda")
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    times = {}
    for tokens in (3, 1, 17):  # the first one warms up
        torch.cuda.synchronize()
        begun = time.perf_counter()
        part.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, **settings)
        torch.cuda.synchronize()
        times[tokens] = time.perf_counter() - begun
    return (times[17] - times[1]) / 16


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def vllm(options: argparse.Namespace) -> dict[str, Any]:
    """What `gpu_vllm.py` finds, each way of experts' weights in a process of its own."""
    place = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK"}
    environment = {name: value for name, value in os.environ.items() if name not in place | {"OUT"}}
    environment |= {"PYTHONPATH": str(options.vllm), "VLLM_CACHE_ROOT": str(options.vllm / "cache")}
    tensor = options.layout.tensor * options.layout.pipeline
    path = options.vllm / "found.json"
    stages = [f"{kind}:tensor_parallel_size={tensor}" for kind in options.weights]
    call = [sys.executable, str(Path(__file__).with_name("gpu_vllm.py")), "--stages", *stages, "--json", str(path)]
    call += [
        "--layers",
        str(options.layers),
        "--sampled",
        "--batches",
        *map(str, options.batches),
        "--log",
        str(options.vllm),
    ]
    subprocess.run([*call, "--budget", str(options.rival_seconds)], env=environment, check=True)
    told = json.loads(path.read_text())
    found: dict[str, Any] = {}
    for kind, stage in zip(options.weights, stages, strict=True):
        one = told.get(stage, {})
        found[kind] = {
            "version": one.get("vllm"),
            "ready_s": one.get("ready_s"),
            "first_token_ms": {
                n: one[f"first_token_ms_{n}"]["median"] for n in (128, 1024) if f"first_token_ms_{n}" in one
            },
            "decoding": {n: one[f"decoding_{n}"] for n in options.batches if f"decoding_{n}" in one},
        }
    return found


def show(report: dict[str, Any]) -> None:
    print(f"{report['card']}, torch {report['torch']}, megatron-core {report['megatron_core']}, {report['date']}")
    print(f"copy {report['copy_tb_s']:.2f} TB/s; {report['layers']} layers, {report['layout']}")
    print(f"prompts {PROMPT}, answers {ANSWER} tokens")
    print(f"{report['ways']}, batches in CUDA graphs")
    for kind, name in KINDS.items():
        if name in report:
            print(f"\nexperts' weights in {kind}")
            show_ours(report[name], rival_of(report, kind))
    if "error" in report.get("transformers", {}):
        print("transformers:", report["transformers"]["error"])


def rival_of(report: dict[str, Any], kind: str) -> dict[str, Any]:
    return report["vllm"].get(kind, {}) if "vllm" in report else report.get("transformers", {})


def show_ours(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name in ("logits_of_fewer_at_once", "logits_in_bf16"):
        if off := mine.get(name):
            print(
                f"{name.replace('_', ' ')}: {off['relative_error']:.2e} off, KL {off['kl']:.2e}, "
                f"{off['same_first_choice']:.1%} have the same first choice"
            )
    print(
        f"cache {mine['cache_gib']:.1f} GiB of {mine['allocated_gib']:.1f} in all; ready in {mine['ready_s']:.0f} s"
    )
    print(f"first token ms {mine['first_token_ms']}; the rival's {theirs.get('first_token_ms')}")
    print("batch  step ms  floor ms    tok/s  of floor  all tok/s  rival's tok/s  all tok/s")
    for batch, result in mine["decoding"].items():
        rival = theirs.get("decoding", {}).get(batch, {})
        share = result["tokens_per_s"] / result["floor_tokens_per_s"]
        cells = [
            f"{batch:5d}",
            f"{result['step_ms']:8.2f}",
            f"{result['floor_ms']:9.2f}",
        ]
        cells += [f"{result['tokens_per_s']:8.0f}", f"{share:9.1%}", f"{result['all_tokens_per_s']:10.0f}"]
        cells += [
            f"{rival.get('tokens_per_s', float('nan')):14.0f}",
            f"{rival.get('all_tokens_per_s', float('nan')):10.0f}",
        ]
        print(*cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 64, 256])
    parser.add_argument("--step-tokens", type=int, default=8192)
    parser.add_argument("--weights", choices=KINDS, nargs="+", default=list(KINDS), help="of the experts")
    parser.add_argument("--layout", default="", help="as tensor=2,expert=2; by default tensors over all GPUs")
    parser.add_argument("--rival", choices=("transformers", "vllm", "none"), default="none")
    parser.add_argument("--vllm", type=Path, help="folder for PYTHONPATH that has vLLM in it")
    parser.add_argument("--rival-seconds", type=int, default=480)
    parser.add_argument("--profiles", type=Path, help="folder for kernel times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := fused.missing():
        sys.exit(f"this needs a GPU and triton: {reason}")
    from megatron_mixtral.kernels import grouped_gemm

    import megatron.core

    options.layout = layout_of(options.layout, int(os.environ.get("WORLD_SIZE", "1")))
    ranks.initialize(options.layout)
    first = torch.distributed.get_rank() == 0  # it tells for all
    if not first:
        sys.stdout, options.json = io.StringIO(), None
    shape = dataclasses.replace(TWO_LAYERS, num_hidden_layers=options.layers)
    rate = copy_rate()
    report = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "ways": "experts by our grouped matmuls" if grouped_gemm._have_tiles() else grouped_gemm.describe(),
        "layers": options.layers,
        "layout": " x ".join(f"{k} {n}" for k, n in dataclasses.asdict(options.layout).items() if n > 1)
        or "one GPU",
        "copy_tb_s": rate / 1e12,
    }
    clean()
    kept: dict[str, torch.Tensor] = {}
    for kind in options.weights:
        with mcore.quiet():
            report[KINDS[kind]], kept[kind] = ours(options, shape, rate, in_fp8=kind == "fp8")
        clean()
        if len(kept) == 2:
            report[KINDS["fp8"]]["logits_in_bf16"] = apart(kept["fp8"], kept["bf16"])
        if options.json:
            options.json.write_text(json.dumps(report, indent=1))
    ranks.shutdown()
    clean()
    if options.rival != "none" and first:
        try:
            report[options.rival] = vllm(options) if options.rival == "vllm" else transformers(options, shape)
        except Exception as error:
            report[options.rival] = {"error": f"{type(error).__name__}: {error}"}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    show(report)


if __name__ == "__main__":
    main()
