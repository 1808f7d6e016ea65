"""A small Mixtral trained from scratch by `finetune` at EP2 x PP2 on CPU, and by transformers on the same data.

    python tests/bench/bench_train.py [TEXT] [--steps 300]

TEXT is taken as bytes, 256 tokens; without one it is a megabyte of the docstrings of Python's library. Both start
from one set of weights in fp32, with AdamW, the same schedule and clipping, one order of samples, and no balancing
loss, which the two define differently. Passes when the first 5 losses agree within 1e-4 and the last validation
losses within 2 %.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import run_job

from launcher.common import sample_text
from megatron_mixtral.data import dataset, indexed
from megatron_mixtral.observability import events

MEGABYTE = 1 << 20
DOCUMENT = 4096  # bytes
SETTINGS: dict[str, Any] = {
    "sequence_length": 128,
    "micro_batch": 4,
    "global_batch": 16,
    "lr": 1e-3,
    "min_lr": 1e-4,
    "warmup_steps": 20,
    "weight_decay": 0.1,
    "clip_grad": 1.0,
    "precision": "fp32",
    "aux_loss": 0.0,
    "validation": 0.1,
    "eval_steps": 20,
    "save_interval": 10**6,
}
BYTES, LAST = 256, 5
MOST_SECONDS = 3600


def make_model(folder: Path) -> Any:
    """Random weights in the hub's layout, and the model that holds them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(1)
    config = MixtralConfig(
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=BYTES,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        router_aux_loss_coef=0.0,
    )
    model = MixtralForCausalLM(config).float()
    model.save_pretrained(folder)
    return model


def write_data(text: bytes, prefix: Path) -> None:
    tokens = np.frombuffer(text, dtype=np.uint8).astype(np.uint16)
    tokens.tofile(f"{prefix}.bin")
    lengths = np.full(math.ceil(len(tokens) / DOCUMENT), DOCUMENT, dtype=np.int32)
    lengths[-1] = len(tokens) - DOCUMENT * (len(lengths) - 1)
    indexed.write_index(Path(f"{prefix}.idx"), lengths, np.dtype(np.uint16))


def learning_rate(step: int, steps: int) -> float:
    """Of step `step` from 1: linear warm-up, then a cosine."""
    peak, low, warmup = SETTINGS["lr"], SETTINGS["min_lr"], SETTINGS["warmup_steps"]
    if step <= warmup:
        return float(peak * step / warmup)
    share = (step - warmup) / (steps - warmup)
    return float(low + (peak - low) * (1 + math.cos(math.pi * share)) / 2)


class Transformers:
    """The rival: a loop as one writes it, over the samples that `finetune` takes."""

    def __init__(self, model: Any, prefix: Path, seed: int = 1234) -> None:
        documents = dataset.Documents(prefix)
        divided = dataset.split(len(documents), SETTINGS["validation"], seed)
        length = SETTINGS["sequence_length"]
        self.train = dataset.Samples(documents, divided.train, length, seed)
        self.validation = dataset.Samples(documents, divided.validation, length, seed, pad=True)
        self.model = model
        matrices = [p for p in model.parameters() if p.dim() > 1]
        others = [p for p in model.parameters() if p.dim() <= 1]
        groups = [
            {"params": matrices, "weight_decay": SETTINGS["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8)

    def losses(self, samples: dataset.Samples, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum over learnt tokens, their number) of one global batch."""
        chosen = range(first, first + SETTINGS["global_batch"])
        ids, mask = (torch.from_numpy(np.stack([samples[n][i] for n in chosen])) for i in range(2))
        logits = self.model(ids[:, :-1]).logits.flatten(0, 1)
        each = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
        learnt = mask[:, 1:].flatten()
        return (each * learnt).sum(), learnt.sum()

    def step(self, number: int, steps: int) -> float:
        total, count = self.losses(self.train, (number - 1) * SETTINGS["global_batch"])
        loss = total / count
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), SETTINGS["clip_grad"])
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, steps)
        self.optimizer.step()
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> float:
        size = SETTINGS["global_batch"]
        rounds = min(SETTINGS["eval_steps"], -(-self.validation.per_epoch // size))
        passes = [self.losses(self.validation, i * size) for i in range(rounds)]
        return float(sum(p[0] for p in passes) / sum(p[1] for p in passes))


def compare(folder: Path, text: bytes, steps: int) -> dict[str, Any]:
    """The losses of both, step by step, and their last validation losses."""
    model = make_model(folder / "hub")
    write_data(text, folder / "data")
    run_job.run("convert", {"source": str(folder / "hub"), "output": str(folder / "megatron")}, folder / "convert")
    settings = SETTINGS | {"steps": steps, "eval_interval": steps}
    settings |= {"model": str(folder / "megatron"), "data": str(folder / "data")}
    begun = time.monotonic()
    settings |= {"layout": {"expert": 2, "pipeline": 2}}
    run_job.run(
        "finetune", settings, folder / "run", ranks=4, timeout=MOST_SECONDS, env={"CUDA_VISIBLE_DEVICES": ""}
    )
    seconds = time.monotonic() - begun
    told = events.read(folder / "run" / "events.jsonl")
    begun = time.monotonic()
    rival = Transformers(model, folder / "data")
    theirs = [rival.step(number, steps) for number in range(1, steps + 1)]
    return {
        "ours": [e["loss"] for e in told if e["event"] == "step"],
        "theirs": theirs,
        "our_validation": next(e["loss"] for e in reversed(told) if e["event"] == "eval"),
        "their_validation": rival.evaluate(),
        "our_seconds": seconds,
        "their_seconds": time.monotonic() - begun,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, default=300)
    asked = parser.parse_args()
    text = asked.text.read_bytes() if asked.text else "\n\n".join(sample_text.docstrings()).encode()[:MEGABYTE]
    with tempfile.TemporaryDirectory() as name:
        found = compare(Path(name), text, asked.steps)
    ours, theirs = found["ours"], found["theirs"]
    first = max(abs(a - b) for a, b in zip(ours[:LAST], theirs[:LAST], strict=True))
    apart = abs(found["our_validation"] / found["their_validation"] - 1)
    name = asked.text.name if asked.text else "docstrings"
    print(f"{asked.steps} steps of {name}, finetune on 4 ranks (EP2 x PP2) and transformers on one:")
    print(f"first losses      {ours[0]:.5f} and {theirs[0]:.5f}; the first {LAST} differ by at most {first:.1e}")
    print(f"last losses       {ours[-1]:.5f} and {theirs[-1]:.5f}")
    print(f"validation losses {found['our_validation']:.4f} and {found['their_validation']:.4f}, {apart:.2%} apart")
    print(f"seconds           {found['our_seconds']:.0f} and {found['their_seconds']:.0f}, starting up included")
    passed = first < 1e-4 and apart < 0.02
    print("passed" if passed else "FAILED: the first losses must agree within 1e-4, validation within 2 %")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
