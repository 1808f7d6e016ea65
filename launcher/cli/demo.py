"""`mixlaunch demo`: the whole chain on this machine, with the commands that a user types.

Every command is printed before it runs, and really runs on the cluster `local`.
"""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import click

from launcher.common import sample_text, terminal
from launcher.errors import Fault, UsageError
from megatron_mixtral.spec import rundir

TEXT_BYTES = 2 << 20  # characters: enough text for the loss to fall, and tokenized within seconds
LEAST_TEXT = 8000  # bytes: a batch, and the documents kept for validation
QUESTION = shlex.split("--raw --prompt 'Return a list of the' --temperature 0.8 --seed 7 --max-tokens 40")
# Small enough for two cores, and still a Mixtral: grouped queries, 8 experts, 2 experts a token.
MODEL = shlex.split("--hidden 128 --intermediate 256")
TRAINING = shlex.split(
    "--pp 2 --ep 2 --steps 80 --sequence-length 64 --micro-batch 2 --global-batch 16 --precision fp32 "
    "--lr 4e-3 --min-lr 4e-4 --warmup-steps 5 --eval-interval 80 --log-interval 4"
)


def run(text: Path | None, folder: Path) -> None:
    """The whole chain in `folder`, on `text` or on the standard library's docstrings; `Fault` where it breaks."""
    if text and not text.is_file():
        raise UsageError(f"--text: {text}: no such file")
    if text and (size := text.stat().st_size) < LEAST_TEXT:
        raise UsageError(f"--text: {text}: {size} bytes of text are too few to train on; give {LEAST_TEXT} or more")
    began = time.monotonic()
    folder = folder.resolve() / time.strftime("%Y%m%d-%H%M%S")
    models, runs = folder / "models", folder / "runs"
    folder.mkdir(parents=True)
    corpus = text or folder / "docstrings.jsonl"
    if not text:
        sample_text.write(corpus, TEXT_BYTES)
    hub, converted = models / "tiny-mixtral", models / "tiny-mixtral-megatron"
    chain = Demo(folder)
    chain.step("A small Mixtral in the hub's layout, with random weights", "tiny", "--output", hub, *MODEL)
    chain.step("Text into token files", "prepare", corpus, "--model", hub)
    chain.step("The hub's layout into Megatron's", "convert", "--model", hub)
    chain.step("Finetuning: 2 pipeline stages x 2 expert ranks", "finetune", "--model", converted, *TRAINING)
    trained = newest(runs, "finetune")
    chain.step("The log of the first rank, and the loss", "logs", trained.name)
    chain.step(
        "Back into the hub's layout", "convert", "--to", "hf", "--model", trained, "--output", models / "tuned"
    )
    chain.step("A server with the trained model", "serve", "--model", trained, "--precision", "fp32", "--no-wait")
    server = newest(runs, "serve")
    try:
        wait_for(server / rundir.SERVER, seconds=120)
        chain.step("A question", "chat", server, *QUESTION)
    finally:
        chain.step("The server ends", "cancel", server.name)
    terminal.heading(f"Done in {time.monotonic() - began:.0f} s. The files:")
    terminal.facts(
        [
            ("text", str(corpus)),
            ("weights as made", str(hub)),
            ("in Megatron's layout", str(converted)),
            ("the training run", str(trained)),
            ("its checkpoints", str(trained / rundir.CHECKPOINTS)),
            ("trained, for transformers", str(models / "tuned")),
            ("the server's run", str(server)),
        ]
    )


class Demo:
    """Runs `mixlaunch` commands on the cluster `local`; all files are in one folder."""

    def __init__(self, folder: Path) -> None:
        self._environment = os.environ | {"MIXLAUNCH_STATE": str(folder), "MIXLAUNCH_CLUSTER": "local"}

    def step(self, title: str, *words: str | Path) -> None:
        """Print the command, run it; `Fault` when it fails."""
        terminal.heading(title)
        command = [f"./{os.path.relpath(word)}" if isinstance(word, Path) else word for word in words]
        terminal.say(f"$ mixlaunch {shlex.join(command)}", "bold")
        launched = [sys.executable, "-P", "-m", "launcher", *command]
        if code := subprocess.run(launched, env=self._environment, check=False).returncode:
            raise Fault(f"mixlaunch {command[0]} ended with exit code {code}")


def newest(runs: Path, job: str) -> Path:
    """The run directory that `job` made last."""
    return max(runs.glob(f"{job}-*"), key=lambda path: path.stat().st_mtime)


def wait_for(path: Path, *, seconds: float) -> None:
    """Until `path` is there; `Fault` after `seconds`."""
    end = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > end:
            raise Fault(f"{path} isn't there after {seconds:g} s")
        time.sleep(0.2)


@click.command()
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    help="Text to train on.  [default: the docstrings of Python's standard library]",
)
@click.option(
    "--folder", type=click.Path(path_type=Path), default=Path("demo"), help="Folder to write.  [default: demo]"
)
def demo(text: Path | None, folder: Path) -> None:
    """Run the whole chain on this machine with a small model.

    It needs no Slurm and no GPU. It makes a small Mixtral, prepares text, converts, trains on 4 processes, converts
    back, serves and asks a question.
    """
    run(text, folder)


COMMANDS = (demo,)
