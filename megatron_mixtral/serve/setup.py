"""What both engines of the serve job check before anything is loaded, and the signals that end it."""

import dataclasses
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_mixtral.errors import InputError
from megatron_mixtral.serve.http.uvicorn_thread import bind
from megatron_mixtral.spec import checks
from megatron_mixtral.spec.jobs import ServeConfig
from megatron_mixtral.spec.shape import MixtralShape
from megatron_mixtral.tokenization import chat_template, tokenizer
from megatron_mixtral.tokenization.chat import Form
from megatron_mixtral.weights import folder as weights_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OTHER_PORTS = 100  # to try behind one that is taken
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is to be served, checked."""

    config: ServeConfig
    folder: Path  # of the weights
    shape: MixtralShape
    words: tokenizer.Tokenizer
    form: Form
    rank: int
    world: int
    key: str | None

    @property
    def name(self) -> str:
        """What clients call the model."""
        return self.config.name or served_name(self.folder)


def served_name(folder: Path) -> str:
    """The name of a folder of weights, or of the run that it is from."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":  # the hub's cache: models--OWNER--NAME/snapshots/COMMIT
        return folder.parents[1].name.rpartition("--")[2]
    parts = [part for part in folder.parts if part not in ("release", "checkpoints")]
    return next(part for part in reversed(parts) if not part.startswith("iter_"))


def checked(config: ServeConfig) -> Setup:
    """`InputError` for what could never be served here."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    key = checked_key(config)
    checks.check(config)
    folder = weights_folder.find(Path(config.model))
    shape = MixtralShape.from_folder(folder)
    words = tokenizer.load(folder)
    if words.vocab_size > shape.vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has {words.vocab_size} tokens, but the model knows {shape.vocab_size}"
        )
    config.layout.data_parallel(world)
    config.layout.check(shape)
    config = within_context(config, shape)
    form = chat_template.form(words)
    for note in words.notes if rank == 0 else ():
        print(f"note: {note}", flush=True)
    return Setup(config=config, folder=folder, shape=shape, words=words, form=form, rank=rank, world=world, key=key)


def checked_key(config: ServeConfig) -> str | None:
    """The key that clients must have; `InputError` where there must be one and isn't."""
    key = os.environ.get("MIXLAUNCH_API_KEY") or None
    if config.host not in LOOPBACK and key is None:
        raise InputError(f"host {config.host} isn't this machine alone: set MIXLAUNCH_API_KEY, or use 127.0.0.1")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("MIXLAUNCH_API_KEY holds blanks or characters beyond ASCII, which clients can't send")
    return key


def within_context(config: ServeConfig, shape: MixtralShape) -> ServeConfig:
    """`config` for a model of `shape`: its context is the most, and what the default means where that is more."""
    context = shape.max_position_embeddings
    if config.max_tokens == ServeConfig.max_tokens and config.max_tokens > context:
        print(f"max_tokens is {context}, this model's context", flush=True)
        return dataclasses.replace(config, max_tokens=context)
    if config.max_tokens > context:
        raise InputError(f"max_tokens {config.max_tokens}: the model's context is {context}")
    return config


def listener(config: ServeConfig) -> socket.socket:
    """Bound to the port that was asked for, or to one of the next where that is allowed."""
    return bind(config.host, config.port, others=OTHER_PORTS if config.other_port else 0)


def on_signal(stop: Callable[[], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, lambda *_: stop())
