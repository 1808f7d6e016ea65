"""The README's table of speed is what the measurements beside docs/performance.md say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
TRAIN, SERVE = (
    json.loads((ROOT / f"docs/measurements/{name}.json").read_text()) for name in ("gpu_train", "gpu_serve")
)


def rows():
    rates = {name: found["forward_backward_tflops"] for name, found in TRAIN["candidates"].items()}
    rival = max(rate for name, rate in rates.items() if name.startswith("transformers"))
    yield "forward and backward", rates["mixlaunch"], rival, TRAIN["ceilings"]["lasting_matmul_tflops"]
    rivals = {batch: found["tokens_per_s"] for batch, found in SERVE["transformers"]["decoding"].items()}
    for batch, found in SERVE["mixlaunch"]["decoding"].items():
        yield f"{batch} answer", found["tokens_per_s"], rivals[batch], found["floor_tokens_per_s"]
    found = SERVE["mixlaunch_fp8"]["decoding"]["256"]
    yield (
        "256 answers at a time with experts in FP8",
        found["tokens_per_s"],
        rivals["256"],
        found["floor_tokens_per_s"],
    )


def test_the_table_is_what_was_measured():
    text = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("## Installing")[0]
    table = [line for line in text.splitlines() if re.match(r"\| [^|]*\d", line)]
    for line, (name, ours, rival, floor) in zip(table, rows(), strict=True):
        assert line.startswith(f"| {name}")
        assert line.endswith(f"| {ours:,.0f} | {rival:,.0f} | {ours / floor:.0%} |".replace("%", " %"))
    assert all(measured["date"] in text for measured in (TRAIN, SERVE))
    first, in_fp8 = (SERVE[kind]["first_token_ms"]["1024"] for kind in ("mixlaunch", "mixlaunch_fp8"))
    assert f"comes after {first:.1f} ms, with experts in FP8 after {in_fp8:.1f}." in text
