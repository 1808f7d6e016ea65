"""The chain on a real Slurm, with real parts, by the commands that a user types: 32 ranks over four nodes and back.

One small Mixtral goes all the way: prepared, converted, trained at EP8 x PP4, loaded at EP2 x PP1, exported and
served. What is compared at the end is transformers' opinion of the exported weights.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from running import wait_until

from launcher.host.local import Local
from launcher.runs import find, logs, record, states
from launcher.slurm import client

SEQUENCE, SAMPLES, STEPS, ANSWER = 32, 16, 3, 16
SETTINGS = [
    *("--precision", "fp32", "--sequence-length", str(SEQUENCE), "--global-batch", "8", "--validation", "0.3"),
    *("--eval-steps", str(SAMPLES // 8), "--warmup-steps", "1"),
]
PROMPTS = ("The cat sat", "Once upon a time there was")


class Chain:
    """A home with a profile of the sandbox, and the commands typed in it."""

    def __init__(self, home: Path, slurm_conf: Path) -> None:
        self.home = home
        self.shared = {name: str(home / name) for name in ("models", "data", "runs")}
        self.write_profile("four", slurm_conf, gpus=8)
        self.write_profile("two", slurm_conf, gpus=2)
        self.write_profile("one", slurm_conf, gpus=1)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("MIXLAUNCH_", "SLURM_", "XDG_"))}
        self.environment = environment | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")}
        (home / "models").mkdir()

    def write_profile(self, name: str, slurm_conf: Path, *, gpus: int) -> None:
        profile = {
            "scheduler": "slurm",
            "slurm_conf": str(slurm_conf),
            "time": "10",
            "node": {"gpus": gpus, "cpus": 64, "memory_gb": 512},
            "python": sys.executable,
            "environment": {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1},
            "paths": self.shared,
            "serve": {"host": "127.0.0.1"},
            "signal_lead": 30,
        }
        (self.home / f"{name}.yaml").write_text(yaml.safe_dump(profile))

    def types(self, *words: str, cluster: str = "four", seconds: float = 270) -> str:
        """What `mixlaunch WORDS` prints; it must end with 0."""
        argv = [sys.executable, "-m", "launcher", *words]
        environment = self.environment | {"MIXLAUNCH_CLUSTER": str(self.home / f"{cluster}.yaml")}
        done = subprocess.run(argv, cwd=self.home, env=environment, capture_output=True, text=True, timeout=seconds)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}{self.stories()}"
        return done.stdout

    def run(self, name: str) -> record.Run:
        return find.run(name, [self.home / "runs"])

    def stories(self) -> str:
        texts = []
        for log in sorted((self.home / "runs").glob("*/logs/**/*")):
            if log.is_file() and log.name in ("batch.log", "rank_0.log"):
                texts.append(f"--- {log.relative_to(self.home)}\n{log.read_text(errors='replace')[-1500:]}")
        return "\n".join(texts)


@pytest.fixture(scope="module")
def chain(site, tmp_path_factory):
    """Prepared text and converted weights of a small Mixtral whose greedy answers hardly repeat."""
    found = Chain(tmp_path_factory.mktemp("chain"), site.slurm_conf)
    make_model(found.home / "models" / "small")
    with (found.home / "text.jsonl").open("w") as stream:
        for number in range(120):
            text = f"Document {number} tells what {number} and {number + 1} make: {2 * number + 1}. " * 3
            stream.write(json.dumps({"text": text}) + "\n")
    model = str(found.home / "models" / "small")
    found.types("prepare", "text.jsonl", "--model", model, "--wait")
    found.types("convert", "--model", model, "--preset", "train", "--wait")
    return found


@pytest.fixture(scope="module")
def trained(chain):
    """Done when 2: `finetune --nodes 4` on a profile of 4 nodes x 8 GPUs, through submitit, to its end."""
    weights = str(chain.home / "models" / "small-megatron")
    chain.types(
        *("finetune", "--nodes", "4", "--model", weights, "--steps", str(STEPS), "--name", "wide", "--wait"),
        *SETTINGS,
    )
    return chain.run("wide")


def make_model(folder: Path) -> None:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    from megatron_mixtral.jobs import tiny

    torch.manual_seed(7)
    config = MixtralConfig(
        num_hidden_layers=4,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=32000,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        initializer_range=0.2,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tiny.write_tokenizer(folder)


@pytest.mark.many_ranks
@pytest.mark.timeout(600)
def test_32_ranks_over_four_nodes_train_at_ep8_pp4(chain, trained):
    start = next(event for event in logs.events(trained.path) if event["event"] == "start")
    assert start["world"] == 32
    assert start["layout"] == {
        "tensor": 1, "pipeline": 4, "expert": 8, "expert_tensor": 1, "context": 1, "data": 8,
    }  # fmt: skip
    steps = [event["step"] for event in logs.events(trained.path) if event["event"] == "step"]
    assert steps == [1, 2, 3]
    assert len(list((trained.path / "logs" / "attempt_0").glob("rank_*.log"))) == 32
    state = states.of_run(trained)
    assert (state.state, state.nodes, state.exit_code) == ("COMPLETED", "sandbox[0-3]", 0)
    assert (trained.path / "submitit" / f"{trained.job_id}_submitted.pkl").exists()


@pytest.fixture(scope="module")
def exported(chain, trained):
    """The trained weights in the hub's layout."""
    chain.types("convert", "--to", "hf", "--model", trained.name, "--output", str(chain.home / "hf"), "--wait")
    return chain.home / "hf"


def transformers_loss(folder: Path, data: Path) -> float:
    """Mean validation loss by transformers alone, over the documents that training kept for validation."""
    import numpy as np
    import torch
    from transformers import MixtralForCausalLM

    from megatron_mixtral.data import dataset

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    documents = dataset.Documents(data)
    kept = dataset.split(len(documents), 0.3, 1234).validation
    samples = dataset.Samples(documents, kept, SEQUENCE, 1234, pad=True)
    assert samples.per_epoch >= SAMPLES, "both must have seen the same samples"
    pairs = [samples[n] for n in range(SAMPLES)]
    ids, mask = (torch.from_numpy(np.stack(parts)) for parts in zip(*pairs, strict=True))
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    learnt = mask[:, 1:].flatten()
    return float((losses * learnt).sum() / learnt.sum())


@pytest.mark.timeout(600)
def test_the_checkpoint_loads_elsewhere_and_transformers_agrees(chain, trained, exported):
    """At EP2 x PP1 without learning, the validation loss is that of EP8 x PP4 and of transformers."""
    still = ("--lr", "0", "--min-lr", "0", "--steps", "1")
    chain.types(
        *("finetune", "--model", trained.name, "--pp", "1", "--ep", "2", "--name", "narrow", "--wait"),
        *(*SETTINGS, *still),
    )
    narrow = chain.run("narrow")
    start = next(event for event in logs.events(narrow.path) if event["event"] == "start")
    assert start["world"] == 2
    assert start["source"].startswith(str(trained.path / "checkpoints"))
    wide_loss, narrow_loss = (logs.newest(run.path)["eval"]["loss"] for run in (trained, narrow))
    assert narrow_loss == pytest.approx(wide_loss, abs=1e-4)
    assert transformers_loss(exported, chain.home / "data" / "finetune") == pytest.approx(wide_loss, abs=1e-4)


@pytest.mark.timeout(600)
def test_pp2_over_two_nodes_serves_what_transformers_says(chain, trained, exported):
    """Waited for until it is ready, found without an address, asked by terminal and browser, cancelled."""
    told = chain.types(
        *("serve", "--model", trained.name, "--pp", "2", "--precision", "fp32", "--max-tokens", "256"),
        cluster="one",
    )
    run = chain.run("serve")
    assert (run.record["nodes"], run.record["tasks_per_node"], run.record["layout"]["pipeline"]) == (2, 1, 2)
    assert (run.path / "submitit" / f"{run.job_id}_submitted.pkl").exists()
    url = json.loads((run.path / "server.json").read_text())["url"]
    check_megatron_api(url, exported)
    check_curl(told, run)
    said = chain.types("chat", "-p", "Hello", "--temperature", "0", "--max-tokens", "8", cluster="one")
    assert said == check_page(url, {"temperature": "0", "max_tokens": "8"}, "Hello") + "\n"
    [told] = json.loads(chain.types("status", run.name, "--json", cluster="one"))
    assert (told["server"]["answers"], told["server"]["queued"]) == (True, 0)
    assert told["server"]["requests"] >= 3
    ranks = running_ranks(run)
    assert len(ranks) == 2
    chain.types("cancel", run.name, cluster="one")
    wait_until(lambda: not states.of_run(run).active, 60, run)
    wait_until(lambda: not running_ranks(run), 10, run)
    assert not (run.path / "server.json").exists()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def check_megatron_api(url: str, exported: Path) -> None:
    """`PUT /api`, greedy, token for token."""
    body = {"prompts": list(PROMPTS), "tokens_to_generate": ANSWER, "top_k": 1}
    answer = httpx.put(f"{url}/api", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert answer.json()["tokens"] == continuations(exported)
    assert all(text.startswith(prompt) for text, prompt in zip(answer.json()["text"], PROMPTS, strict=True))


def check_curl(told: str, run: record.Run) -> None:
    """The line that was printed does what it says."""
    line = next(line.split(maxsplit=1)[1] for line in told.splitlines() if " curl " in line)
    answer = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout)["choices"][0]["message"]["role"] == "assistant", run


def check_page(url: str, settings: dict[str, str], question: str) -> str:
    """What the page shows as the answer, in Chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here; on Debian: apt-get install --no-install-recommends chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(url + "/")
        page.get_by_role("button", name="Settings").click()
        for name, value in settings.items():
            page.locator(f"#{name}").fill(value)
        page.locator("#question").fill(question)
        page.keyboard.press("Enter")
        playwright.expect(page.locator("article.assistant footer")).to_contain_text("second")
        said = page.locator("article.assistant div").text_content()
        browser.close()
    return said


def running_ranks(run: record.Run) -> list[int]:
    """Processes of its ranks, on whatever node of the sandbox."""
    config = str(run.path / "config.yaml")
    return [p.pid for p in psutil.process_iter(["cmdline"]) if config in (p.info["cmdline"] or [])]


def continuations(folder: Path) -> list[list[int]]:
    """By transformers alone: each prompt's tokens and its greedy continuation's."""
    import torch
    from transformers import AutoTokenizer, MixtralForCausalLM

    model = MixtralForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        ids = model.generate(words(prompt, return_tensors="pt").input_ids, max_new_tokens=ANSWER, do_sample=False)
        found.append(ids[0].tolist())
    assert len({token for ids in found for token in ids}) > ANSWER, "the answers are too alike to tell"
    return found


@pytest.mark.timeout(600)
def test_an_exported_script_trains_by_plain_sbatch(chain):
    """Done when 5: two nodes of two ranks; nothing but sbatch touches the script on its way."""
    weights = str(chain.home / "models" / "small-megatron")
    script = chain.home / "exported.sbatch"
    script.write_text(
        chain.types(
            *("export", "finetune", "--model", weights, "--pp", "2", "--ep", "2", "--nodes", "2"),
            *("--steps", "2", "--name", "plain", *SETTINGS),
            cluster="two",
        )
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(chain.home)}
    environment["SLURM_CONF"] = yaml.safe_load((chain.home / "two.yaml").read_text())["slurm_conf"]
    done = subprocess.run(["sbatch", script], env=environment, cwd=chain.home, capture_output=True, text=True)
    job = re.search(r"\d+", done.stdout)[0]
    run_dir = chain.home / "runs" / f"plain-{job}"
    host = Local(environment["SLURM_CONF"])
    wait_until(lambda: not client.states([job], host)[job].active, 120)
    assert client.states([job], host)[job].state == "COMPLETED", chain.stories()
    newest = logs.newest(run_dir)
    assert newest["step"]["step"] == 2
    assert newest["exit"]["code"] == 0
    assert (run_dir / "checkpoints" / "iter_0000002" / "mixlaunch.json").exists()
