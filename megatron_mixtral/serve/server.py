"""The serve job: every rank loads its part of the model, rank 0 answers HTTP, and all of them end together.

It ends with 0 on SIGTERM or the early warning, after a drain; with 1, and word to every client, when a rank dies.
"""

import dataclasses
import functools
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mixtral.errors import InputError
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.observability.progress import Progress
from megatron_mixtral.serve import announce
from megatron_mixtral.spec.jobs import MixtralShape, ServeConfig
from megatron_mixtral.tokenization import chat_template, tokenizer
from megatron_mixtral.tokenization.chat import Form
from megatron_mixtral.weights import folder as weights_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PRECISIONS = ("bf16", "fp32")
ENGINES = ("megatron", "vllm")
LEAST = {"max_batch": 1, "max_tokens": 2, "queue": 0, "queue_tokens": 0, "drain_seconds": 0, "port": 0}
OTHER_PORTS = 100  # to try behind one that is taken
GRACE_SECONDS = 3.0  # between a rank's death and ours: clients and `/health` get to say so
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


def run(config: ServeConfig, run_dir: Path) -> None:
    """Serve `config.model` until told to stop; `InputError` before anything is loaded when it can't."""
    if config.engine not in ENGINES:
        raise InputError(f"engine {config.engine!r} isn't one of {', '.join(ENGINES)}")
    if config.engine == "vllm":
        from megatron_mixtral.serve import vllm

        vllm.run(config, run_dir)
        return
    setup = checked(config)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    if setup.rank == 0:
        from megatron_mixtral.serve.http import uvicorn_thread

        uvicorn_thread.allow_many_connections()
        listener = uvicorn_thread.bind(config.host, config.port, others=OTHER_PORTS if config.other_port else 0)
        if (port := listener.getsockname()[1]) != config.port and config.port:
            print(f"port {config.port} is taken; this server takes {port}", flush=True)
        Server(setup, run_dir, listener).run()
    else:
        _follow(setup)


def checked(config: ServeConfig) -> Setup:
    """`InputError` for what could never be served here."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    key = checked_key(config)
    check_numbers(config)
    folder = weights_folder.find(Path(config.model))
    shape = MixtralShape.from_folder(folder)
    words = tokenizer.load(folder)
    if words.vocab_size > shape.vocab_size:
        raise InputError(
            f"{folder}: its tokenizer has {words.vocab_size} tokens, but the model knows {shape.vocab_size}"
        )
    config.layout.data_parallel(world)
    config.layout.check(shape)
    if config.layout.context > 1:
        raise InputError(f"context parallel {config.layout.context}: answers are made token by token; use 1")
    if config.fp8_experts:
        from megatron_mixtral.model import fp8

        if reason := fp8.missing():
            raise InputError(f"fp8_experts: {reason}")
    config = within_context(config, shape)
    form = chat_template.form(words)
    return Setup(config=config, folder=folder, shape=shape, words=words, form=form, rank=rank, world=world, key=key)


def checked_key(config: ServeConfig) -> str | None:
    """The key that clients must have; `InputError` where there must be one and isn't."""
    key = os.environ.get("MIXLAUNCH_API_KEY") or None
    if config.host not in LOOPBACK and key is None:
        raise InputError(f"host {config.host} isn't this machine alone: set MIXLAUNCH_API_KEY, or use 127.0.0.1")
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise InputError("MIXLAUNCH_API_KEY holds blanks or characters beyond ASCII, which clients can't send")
    return key


def check_numbers(config: ServeConfig) -> None:
    """`InputError` for a setting that is out of its range whatever the model."""
    for name, least in LEAST.items():
        if (value := getattr(config, name)) < least:
            raise InputError(f"{name} {value}: must be at least {least}")
    if config.precision not in PRECISIONS:
        raise InputError(f"precision {config.precision!r} isn't one of {', '.join(PRECISIONS)}")


def within_context(config: ServeConfig, shape: MixtralShape) -> ServeConfig:
    """`config` for a model of `shape`: its context is the most, and what the default means where that is more."""
    context = shape.max_position_embeddings
    if config.max_tokens == ServeConfig.max_tokens and config.max_tokens > context:
        print(f"max_tokens is {context}, this model's context", flush=True)
        return dataclasses.replace(config, max_tokens=context)
    if config.max_tokens > context:
        raise InputError(f"max_tokens {config.max_tokens}: the model's context is {context}")
    return config


def load(setup: Setup, log: EventLog) -> Any:
    """This rank's replica of the model."""
    from megatron_mixtral.checkpoint import loading
    from megatron_mixtral.mcore import compat
    from megatron_mixtral.model import build, fp8
    from megatron_mixtral.serve.engine import json_grammar
    from megatron_mixtral.serve.engine.replica import Replica, Sizes

    config, started = setup.config, time.monotonic()
    compat.initialize(config.layout)
    part = build.build(
        setup.shape,
        config.layout,
        precision=config.precision,
        random_weights=False,
        fp8_experts=config.fp8_experts,
    )
    if config.fp8_experts and setup.rank == 0:
        print(fp8.describe(part.decoder.layers[0].mlp.experts), flush=True)
    progress = Progress(loading.size(part), label="loading", events=log)
    loading.load(part, setup.folder, base=config.base, progress=progress.add)
    progress.finish()
    sizes = Sizes(requests=config.max_batch, context_tokens=config.max_tokens)
    replica = Replica(part, sizes, functools.cache(lambda: json_grammar.token_bytes(setup.words)))
    log.write("load", path=str(setup.folder), seconds=round(time.monotonic() - started, 3))
    return replica


class Server:
    """Rank 0."""

    def __init__(self, setup: Setup, run_dir: Path, listener: socket.socket) -> None:
        self._setup, self._listener = setup, listener
        self._place = announce.Place(
            run_dir=run_dir,
            host=setup.config.host,
            port=listener.getsockname()[1],
            wanted=setup.config.port,
            key=setup.key is not None,
        )
        self._log = EventLog(run_dir / "events.jsonl")
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._site: Any = None
        self._lost = threading.Event()

    def run(self) -> None:
        """Until a drain ends; whoever dies first, `server.json` doesn't outlive the service."""
        from megatron_mixtral.mcore import compat
        from megatron_mixtral.serve.engine import links

        on_signal(self._told_to_stop)
        replica = load(self._setup, self._log)
        connections = links.meet(0, self._setup.world, on_lost=self._rank_lost, on_terminate=self._told_to_stop)
        try:
            self._serve(replica, connections)
        finally:
            self._place.remove()
            for link in connections.values():
                link.close()
        self._log.write("exit", code=0, reason="stopped")
        compat.shutdown()

    def _serve(self, replica: Any, connections: dict[int, Any]) -> None:
        from megatron_mixtral.serve.engine.leader import Leader, Places

        places = Places.survey()
        self._site = self._build_site(places.replicas)
        self._site.start()
        self._place.announce(self._log, model=self._setup.name, weights=self._setup.folder)
        leader = Leader(replica, places, connections, inbox=self._inbox, sink=self._site.deliver)
        try:
            leader.run()
        except Exception as error:
            logging.exception("the engine failed")
            self._give_up(f"the engine failed: {type(error).__name__}: {error}")
            threading.Event().wait()  # `_give_up` ends the process
        self._site.join()

    def _build_site(self, replicas: int) -> Any:
        from megatron_mixtral.serve import admission, metrics
        from megatron_mixtral.serve.http import app as api
        from megatron_mixtral.serve.http import requests, uvicorn_thread

        config, running = self._setup.config, self._setup.config.max_batch * replicas
        limits = admission.Limits(
            context=config.max_tokens,
            running=running,
            queued=config.queue,
            tokens=running * config.max_tokens + config.queue_tokens,
        )
        room = admission.Service(limits, self._inbox.put, metrics.Metrics())
        model = requests.Model(
            name=self._setup.name,
            tokenizer=self._setup.words,
            form=self._setup.form,
            vocab_size=self._setup.shape.vocab_size,
            created=int((self._setup.folder / "config.json").stat().st_mtime),
        )
        app = api.application(model, room, key=self._setup.key)
        return uvicorn_thread.Site(self._listener, room, app, inbox=self._inbox)

    def _told_to_stop(self) -> None:
        """SIGTERM or the early warning, here or on another rank."""
        if self._site is None:
            os._exit(0)  # still loading: nobody waits for anything
        if self._lost.is_set():
            return  # `_give_up` ends it; whoever starts the ranks tells all of them to go when one has died
        self._site.drain(self._setup.config.drain_seconds)

    def _rank_lost(self, rank: int) -> None:
        self._give_up(f"rank {rank} of the engine is gone")

    def _give_up(self, reason: str) -> None:
        """Tell the clients and go; the thread that computes may hang for ever with the dead rank."""
        if self._lost.is_set():
            return
        self._lost.set()
        logging.error("%s", reason)
        if self._site is not None:
            self._site.fail(reason)
        self._place.remove()
        self._log.write("exit", code=1, reason=reason)
        threading.Timer(GRACE_SECONDS if self._site is not None else 0, os._exit, (1,)).start()


def _follow(setup: Setup) -> None:
    """Every other rank: it ends when rank 0 says so or is gone, never by itself."""
    from megatron_mixtral.mcore import compat
    from megatron_mixtral.serve.engine import leader as crew
    from megatron_mixtral.serve.engine import links

    connections: dict[int, Any] = {}
    on_signal(lambda: connections[0].send({"terminate": True}) if connections else os._exit(0))
    replica = load(setup, EventLog(None))
    connections.update(links.meet(setup.rank, setup.world, on_lost=lambda _: _leave_soon()))
    places = crew.Places.survey()
    crew.follow(replica, connections[0], speaks=places.speaks[setup.rank])
    compat.shutdown()


def _leave_soon() -> None:
    """Rank 0 is gone; this rank may hang in a collective with it, so its own thread can't be waited for."""
    threading.Timer(1.0, os._exit, (1,)).start()


def on_signal(stop: Callable[[], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, lambda *_: stop())
