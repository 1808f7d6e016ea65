"""The README's table of speed is what the measurements beside docs/performance.md say."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TRAIN, SERVE = (
    json.loads((ROOT / f"docs/measurements/{name}.json").read_text()) for name in ("gpu_train", "gpu_serve")
)


def rows():
    rates = {name: found["forward_backward_tflops"] for name, found in TRAIN["candidates"].items()}
    rival = max(rate for name, rate in rates.items() if name.startswith("transformers"))
    yield "forward and backward", rates["mixlaunch"], rival, TRAIN["ceilings"]["lasting_matmul_tflops"]
    for batch, found in SERVE["mixlaunch"]["decoding"].items():
        rival = SERVE["transformers"]["decoding"][batch]["tokens_per_s"]
        yield f"{batch} answer", found["tokens_per_s"], rival, found["floor_tokens_per_s"]


def test_the_table_is_what_was_measured():
    text = (ROOT / "README.md").read_text().partition("## Speed")[2].partition("## Installing")[0]
    table = [line for line in text.splitlines() if re.match(r"\| [^|]*\d", line)]
    for line, (name, ours, rival, floor) in zip(table, rows(), strict=True):
        assert line.startswith(f"| {name}")
        assert line.endswith(f"| {ours:,.0f} | {rival:,.0f} | {ours / floor:.0%} |".replace("%", " %"))
    assert all(measured["date"] in text for measured in (TRAIN, SERVE))
