"""Training speed on one GPU beside the chip's own ceilings, the plain layers and transformers, all in one run.

The model has Mixtral 8x7B's true sizes in two layers; routing is the model's own. A FLOP is counted where the work
needs it: causal attention by its lower half, nothing for what is computed twice.
"""

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_candidates import SHAPE, Ours, Task, Transformers

from megatron_mixtral import kernels as fused
from megatron_mixtral import mcore
from megatron_mixtral.mcore import ranks
from megatron_mixtral.spec.layout import Layout
from megatron_mixtral.spec.shape import MixtralShape

WARM_UP = 3


def seconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Of each repetition, by the device's clock, after a warm-up."""
    for _ in range(WARM_UP):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in times]


def ceilings() -> dict[str, float]:
    """The chip's own large matrix product (TFLOP/s) and copy (TB/s, bytes read and written), on random numbers.

    The product is given as it starts from rest and as it goes on after two seconds: power limits the clock by then.
    """
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = seconds(lambda: a @ b, 1500)
    rested, lasting = (2 * n**3 / statistics.median(part) / 1e12 for part in (times[:50], times[-300:]))
    source = torch.randn(2**30, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(seconds(lambda: target.copy_(source), 20))
    return {
        "matmul_tflops": rested,
        "lasting_matmul_tflops": lasting,
        "copy_tb_s": 2 * source.nbytes / copy / 1e12,
    }


CANDIDATES: dict[str, Callable[[], Any]] = {
    "mixlaunch": lambda: Ours(fuse=True),
    "mixlaunch, plain layers": lambda: Ours(fuse=False),
    "transformers, grouped": lambda: Transformers("grouped_mm"),
    "transformers, eager": lambda: Transformers("eager"),
    "transformers, fp32 weights": lambda: Transformers("eager", torch.float32),
}
RIVALS = tuple(name for name in CANDIDATES if name.startswith("transformers"))


def measure(make: Callable[[], Any], task: Task, micro_batches: list[int], profile: Path | None) -> dict[str, Any]:
    """Speed and memory of one candidate; the model is gone afterwards."""
    before = torch.cuda.memory_allocated()
    candidate = make()
    standing = torch.cuda.memory_allocated() - before
    ids = [task.batch(i) for i in range(4)]
    turn = iter(range(10**9))

    def one() -> torch.Tensor:
        return candidate.forward_backward(ids[next(turn) % 4])

    def pass_alone() -> None:
        candidate.begin()
        one()

    candidate.begin()
    one()
    held = torch.cuda.memory_allocated()  # with gradients
    torch.cuda.reset_peak_memory_stats()
    one()
    activations = torch.cuda.max_memory_allocated() - held
    times = forward_backward_alone(candidate, one, task.repeats)
    found: dict[str, Any] = {
        "forward_backward_s": statistics.median(times),
        "spread_s": [min(times), max(times)],
        "standing_gib": standing / 2**30,
        "activations_gib": activations / 2**30,
        "sm_mhz": torch.cuda.clock_rate(),
        "steps": {},
    }
    found["forward_backward_tflops"] = task.flops / found["forward_backward_s"] / 1e12
    if profile:
        write_profile(pass_alone, profile)
    for count in micro_batches:

        def step(count: int = count) -> None:
            candidate.begin()
            for _ in range(count):
                one()
            candidate.end()

        took = statistics.median(seconds(step, max(2, task.repeats // (2 * count))))
        found["steps"][count] = {"s": took, "tflops": count * task.flops / took / 1e12}
    found["step_peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
    candidate.close()
    return found


def forward_backward_alone(candidate: Any, one: Callable[[], Any], repeats: int) -> list[float]:
    """Each pass from cleared gradients, the clearing outside of the time."""
    times = []
    for i in range(WARM_UP + repeats):
        candidate.begin()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        one()
        end.record()
        if i >= WARM_UP:
            times.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1000 for start, end in times]


def write_profile(run: Callable[[], Any], path: Path) -> None:
    """Kernel times of one pass, longest first, to a text file."""
    from torch.profiler import ProfilerActivity

    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
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


def agreement(task: Task, steps: int) -> dict[str, Any]:
    """Ours and the plain layers in bf16 beside the plain ones in fp32, from the same weights.

    Losses are compared step by step; how far bf16 noise alone carries them shows `nudged`, the plain layers again
    with one weight in a hundred moved to its bf16 neighbour. Gradients are compared after the first pass by
    ||a - b|| / ||b||. Two bf16 models send some tokens to different experts, which no rounding explains away:
    `same_experts` repeats that with as many experts as a token takes, where nothing can tip over.
    """
    curves, gradients = follow(task, SHAPE, steps)
    _, same = follow(task, dataclasses.replace(SHAPE, num_local_experts=SHAPE.num_experts_per_tok), 0)
    apart = {
        pair: max(abs(a - b) for a, b in zip(*(curves[kind] for kind in pair.split(" to ")), strict=True))
        for pair in ("fused to plain", "nudged to plain", "fused to fp32", "plain to fp32")
    }
    return {"losses": curves, "losses_apart": apart, "gradients": gradients, "gradients_same_experts": same}


def follow(
    task: Task, shape: MixtralShape, steps: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Losses of `steps` steps, and distances of the first gradients, of each model with the same weights."""
    kinds = {"fp32": ("fp32", False), "plain": ("bf16", False), "fused": ("bf16", True)}
    if steps:
        kinds["nudged"] = ("bf16", False)
    curves: dict[str, list[float]] = {}
    first: dict[str, dict[str, torch.Tensor]] = {}
    for kind, (precision, fuse) in kinds.items():
        candidate = Ours(fuse, precision=precision, shape=shape, nudge=kind == "nudged")
        losses = []
        for step in range(max(steps, 1)):
            candidate.begin()
            losses.append(candidate.forward_backward(task.batch(step)))
            if step == 0:
                first[kind] = {n: p.main_grad.clone() for n, p in candidate.parameters.items()}
            if steps:
                candidate.end()
        curves[kind] = [float(loss) for loss in losses]
        candidate.close()
        del candidate
        clean()
        if kind == "nudged":
            first.pop(kind)
    pairs = {
        "fused to fp32": ("fused", "fp32"),
        "plain to fp32": ("plain", "fp32"),
        "fused to plain": ("fused", "plain"),
    }
    return curves, {pair: distances(first[a], first[b]) for pair, (a, b) in pairs.items()}


def distances(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> dict[str, float]:
    """||a - b|| / ||b|| by tensor, and of all numbers together."""
    squares = {name: [0.0, 0.0] for name in ours}
    for name in ours:
        a, b = ours[name], reference[name]
        squares[name] = [float((a - b).norm()) ** 2, float(b.norm()) ** 2]
    squares["all"] = [sum(part) for part in zip(*squares.values(), strict=True)]
    return {name: (difference / whole) ** 0.5 for name, (difference, whole) in squares.items()}


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def rows(found: dict[str, Any], top: dict[str, float]) -> Iterator[list[str]]:
    for name, result in found.items():
        if "error" in result:
            yield [name, result["error"][:60], *[""] * 6]
            continue
        speed = result["forward_backward_tflops"]
        steps = [f"{s['tflops']:.0f}" for s in result["steps"].values()]
        yield [
            name,
            f"{result['forward_backward_s'] * 1000:.1f}",
            f"{speed:.0f}",
            f"{speed / top['matmul_tflops']:.1%}",
            f"{speed / top['lasting_matmul_tflops']:.1%}",
            " / ".join(steps),
            f"{result['activations_gib']:.1f}",
            f"{result['step_peak_gib']:.1f}",
        ]


def show(report: dict[str, Any], counts: list[int]) -> None:
    top = report["ceilings"]
    print(f"{report['card']}, torch {report['torch']}, megatron-core {report['megatron_core']}, {report['date']}")
    print(report["ways"])
    print(
        f"matrix product {top['matmul_tflops']:.0f} TFLOP/s from rest, {top['lasting_matmul_tflops']:.0f} lasting; "
        f"copy {top['copy_tb_s']:.2f} TB/s"
    )
    print(f"one pass {report['flops'] / 1e12:.1f} TFLOP: {report['floor_s'] * 1000:.1f} ms at the product's rate")
    passes = f"step of {' / '.join(map(str, counts))} passes"
    head = ["", "ms", "TFLOP/s", "of product", "of lasting", passes, "activations GiB", "step's peak GiB"]
    table = [head, *rows(report["candidates"], top)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
    if "agreement" in report:
        show_agreement(report["agreement"])


def show_agreement(found: dict[str, Any]) -> None:
    apart = ", ".join(f"{pair} {value:.4f}" for pair, value in found["losses_apart"].items())
    print(f"losses of {len(found['losses']['fp32'])} steps, furthest apart: {apart}")
    for key, text in (("gradients", ""), ("gradients_same_experts", ", two experts of two")):
        for pair, values in found[key].items():
            worst = max(values, key=lambda name: values[name])
            print(f"gradients{text}, {pair}: {values['all']:.2e} in all, {values[worst]:.2e} at worst ({worst})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--micro-batch", type=int, default=2)
    parser.add_argument("--passes", type=int, nargs="+", default=[1, 16], help="micro batches in a whole step")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, default=list(CANDIDATES))
    parser.add_argument("--agree", type=int, default=20, help="steps compared with the plain layers; 0 for none")
    parser.add_argument("--profiles", type=Path, help="folder for kernel times")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if reason := fused.missing():
        sys.exit(f"this needs a GPU and triton: {reason}")
    ranks.initialize(Layout())
    task = Task(sequence=options.sequence, rows=options.micro_batch, repeats=options.repeats)
    with mcore.quiet():
        report = measure_all(options, task)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))
    show(report, options.passes)
    ranks.shutdown()


def measure_all(options: argparse.Namespace, task: Task) -> dict[str, Any]:
    from megatron_mixtral.kernels import grouped_gemm

    import megatron.core

    top = ceilings()
    clean()
    report: dict[str, Any] = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "megatron_core": megatron.core.__version__,
        "ways": grouped_gemm.describe(),
        "date": time.strftime("%Y-%m-%d"),
        "workload": {"layers": 2, "sequence": task.sequence, "micro_batch": task.rows},
        "ceilings": top,
        "flops": task.flops,
        "floor_s": task.flops / top["matmul_tflops"] / 1e12,
        "candidates": {},
    }
    for name in options.only:
        profile = options.profiles and options.profiles / f"{name.replace(', ', '_').replace(' ', '_')}.txt"
        try:
            report["candidates"][name] = measure(CANDIDATES[name], task, options.passes, profile)
        except Exception as error:
            if name not in RIVALS:
                raise
            report["candidates"][name] = {"error": f"{type(error).__name__}: {error}"}
        clean()
    if options.agree:
        report["agreement"] = agreement(dataclasses.replace(task, rows=1), options.agree)
    report["ceilings_after"] = ceilings()
    return report


if __name__ == "__main__":
    main()
