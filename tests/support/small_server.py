"""A served small Mixtral for tests: what transformers says about it, and servers on real processes."""

import json
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from run_job import Job

SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "vocab_size": 32003,  # more than the tokenizer's, as models have that were padded
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
ANSWER = 16  # tokens that the reference continues each prompt by


def make_model(folder: Path, **changes) -> Path:
    """A random Mixtral in the hub's layout whose greedy answers hardly repeat, with the real tokenizer."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from megatron_mixtral.jobs import tiny

    torch.manual_seed(7)
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = MixtralForCausalLM(MixtralConfig(**(SHAPE | changes), rope_parameters=rope))
    model.save_pretrained(folder)
    tiny.write_tokenizer(folder)
    return folder


def continuations(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """By transformers alone: greedy tokens of each prompt, and log probabilities of all tokens but the first."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = model.generate(torch.tensor([prompt]), max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
            found.append((ids[0, len(prompt) :].tolist(), of_tokens(model, ids)))
    return found


def of_tokens(model, ids) -> list[float]:
    """Log probabilities that a model of transformers gives to all tokens of `ids` [1, length] but the first."""
    logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None]).squeeze(1).tolist()


@dataclass
class Running:
    """A server that has said it's ready."""

    job: Job
    url: str
    state: dict

    def client(self, **options) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, **options)

    def stop(self, timeout: float = 20) -> list[int]:
        """Exit codes after SIGTERM to every rank, as Slurm sends it."""
        for rank, process in enumerate(self.job.processes):
            if process.poll() is None:
                self.job.signal(rank, signal.SIGTERM)
        return self.job.wait(timeout)

    def metric(self, name: str) -> float:
        text = self.client().get("/metrics").text
        return float(next(line.split()[-1] for line in text.splitlines() if line.startswith(f"mixlaunch_{name} ")))

    def until(self, condition, timeout: float) -> float:
        """Seconds until `condition()` holds; the test fails when it doesn't in time."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < timeout, self.job.output()
            time.sleep(0.02)
        return time.monotonic() - begin


@contextmanager
def server(run_dir: Path, model: Path, *, ranks: int = 1, env: dict[str, str] | None = None, **config):
    """`Running`, stopped at the end whatever happened."""
    settings = {
        "model": str(model),
        "port": 0,
        "precision": "fp32",
        "max_tokens": 256,
        "max_batch": 8,
        "name": "tiny",
    }
    job = Job("serve", settings | config, run_dir, ranks=ranks, env=env)
    try:
        job.wait_for("ready", timeout=90)
        state = json.loads((run_dir / "server.json").read_text())
        yield Running(job, state["url"], state)
    finally:
        job.close()
