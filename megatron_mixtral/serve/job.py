"""The serve job: every rank loads its part of the model, rank 0 answers HTTP, and all of them end together.

It ends with 0 on SIGTERM or the early warning, after a drain; with 1, and word to every client, when a rank dies.
"""

import json
import logging
import os
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mixtral.config import MixtralShape, ServeConfig
from megatron_mixtral.errors import InputError
from megatron_mixtral.events import EventLog

LOOPBACK = ("127.0.0.1", "localhost", "::1")
GRACE_SECONDS = 3.0  # between a rank's death and ours: clients and `/health` get to say so
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)


def run(config: ServeConfig, run_dir: Path) -> None:
    """Serve `config.model` until told to stop; `InputError` before anything is loaded when it can't."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    key = os.environ.get("MIXLAUNCH_API_KEY") or None
    if config.host not in LOOPBACK and key is None:
        raise InputError(
            f"host {config.host} can be reached from elsewhere: set MIXLAUNCH_API_KEY, or use 127.0.0.1"
        )
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    if rank == 0:
        from megatron_mixtral.serve import http

        listener = http.bind(config.host, config.port)
        Server(config, run_dir, listener, key=key, world=world).run()
    else:
        _follow(config, rank, world)


def load(config: ServeConfig, log: EventLog) -> tuple[Any, MixtralShape, Path]:
    """This rank's replica of the model, the model's shape, and the folder of weights it came from."""
    from megatron_mixtral import checkpoint, mcore, model, weights_folder
    from megatron_mixtral.serve.replica import Replica, Sizes

    folder = weights_folder.resolve(Path(config.model))
    shape = MixtralShape.from_folder(folder)
    if config.max_tokens > shape.max_position_embeddings:
        raise InputError(f"max_tokens {config.max_tokens}: the model's context is {shape.max_position_embeddings}")
    started = time.monotonic()
    mcore.initialize(config.layout)
    parts = model.build(shape, config.layout, precision=config.precision, random_weights=False)
    checkpoint.load_weights(parts, folder)
    sizes = Sizes(requests=config.max_batch, context_tokens=config.max_tokens)
    replica = Replica(parts, sizes)
    log.write("load", path=str(folder), seconds=round(time.monotonic() - started, 3))
    return replica, shape, folder


class Server:
    """Rank 0."""

    def __init__(
        self, config: ServeConfig, run_dir: Path, listener: socket.socket, *, key: str | None, world: int
    ) -> None:
        self._config, self._run_dir, self._listener = config, run_dir, listener
        self._key, self._world = key, world
        self._log = EventLog(run_dir / "events.jsonl")
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._site: Any = None
        self._lost = threading.Event()

    def run(self) -> None:
        from megatron_mixtral import mcore
        from megatron_mixtral.serve import links

        on_signal(self._told_to_stop)
        replica, shape, folder = load(self._config, self._log)
        connections = links.meet(0, self._world, on_lost=self._rank_lost, on_terminate=self._told_to_stop)
        try:
            self._serve(replica, shape, folder, connections)
        finally:
            (self._run_dir / "server.json").unlink(missing_ok=True)
            for link in connections.values():
                link.close()
        self._log.write("exit", code=0, reason="stopped")
        mcore.shutdown()

    def _serve(self, replica: Any, shape: MixtralShape, folder: Path, connections: dict[int, Any]) -> None:
        from megatron_mixtral.serve.crew import Leader, Places

        places = Places.survey()
        self._site = self._build_site(shape, folder, places.replicas)
        self._site.start()
        self._announce(folder)
        leader = Leader(replica, places, connections, inbox=self._inbox, sink=self._site.deliver)
        try:
            leader.run()
        except Exception as error:
            if not self._lost.is_set():
                self._give_up(f"the engine failed: {type(error).__name__}: {error}")
            logging.exception("the engine failed")
            threading.Event().wait()  # `_give_up` ends the process
        self._site.join()

    def _build_site(self, shape: MixtralShape, folder: Path, replicas: int) -> Any:
        from megatron_mixtral import tokenizer
        from megatron_mixtral.serve import api, asking, http, metrics, service

        config, running = self._config, self._config.max_batch * replicas
        limits = service.Limits(
            context=config.max_tokens,
            running=running,
            queued=config.queue,
            queued_tokens=(running + config.queue) * config.max_tokens,
        )
        room = service.Service(limits, self._inbox.put, metrics.Metrics())
        model = asking.Model(
            name=config.name or model_name(Path(config.model)),
            tokenizer=tokenizer.load(folder),
            vocab_size=shape.vocab_size,
            created=int((folder / "config.json").stat().st_mtime),
        )
        self._model_name = model.name
        return http.Site(self._listener, room, api.application(model, room, key=self._key), inbox=self._inbox)

    def _announce(self, folder: Path) -> None:
        host, port = self._config.host, self._listener.getsockname()[1]
        seen = socket.gethostname() if host in ("0.0.0.0", "::") else host
        url = f"http://{f'[{seen}]' if ':' in seen else seen}:{port}"
        state = {"host": seen, "port": port, "url": url, "pid": os.getpid(), "state": "ready"}
        partial = self._run_dir / "server.json.partial"
        partial.write_text(json.dumps({**state, "model": self._model_name, "weights": str(folder)}) + "\n")
        partial.rename(self._run_dir / "server.json")
        self._log.write("ready", url=url)
        needs_key = ' -H "Authorization: Bearer $MIXLAUNCH_API_KEY"' if self._key else ""
        print(f"ready: {self._model_name} at {url}; try", flush=True)
        body = '{"prompts": ["Hello"], "tokens_to_generate": 16}'
        print(f"  curl -X PUT {url}/api{needs_key} -H 'Content-Type: application/json' -d '{body}'", flush=True)

    def _told_to_stop(self) -> None:
        """SIGTERM or the early warning, here or on another rank."""
        if self._site is None:
            os._exit(0)  # still loading: nobody waits for anything
        self._site.drain(self._config.drain_seconds)

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
        (self._run_dir / "server.json").unlink(missing_ok=True)
        self._log.write("exit", code=1, reason=reason)
        threading.Timer(GRACE_SECONDS if self._site is not None else 0, os._exit, (1,)).start()


def _follow(config: ServeConfig, rank: int, world: int) -> None:
    """Every other rank: it ends when rank 0 says so or is gone, never by itself."""
    from megatron_mixtral import mcore
    from megatron_mixtral.serve import crew, links

    connections: dict[int, Any] = {}
    on_signal(lambda: connections[0].send({"terminate": True}) if connections else os._exit(0))
    replica, _, _ = load(config, EventLog(None))
    connections.update(links.meet(rank, world, on_lost=lambda _: _leave_soon()))
    places = crew.Places.survey()
    crew.follow(replica, connections[0], speaks=places.speaks[rank])
    mcore.shutdown()


def _leave_soon() -> None:
    """Rank 0 is gone; this rank may hang in a collective with it, so its own thread can't be waited for."""
    threading.Timer(1.0, os._exit, (1,)).start()


def on_signal(stop: Callable[[], None]) -> None:
    for number in SIGNALS:
        signal.signal(number, lambda *_: stop())


def model_name(path: Path) -> str:
    """What clients call the model: its folder's name, or its run's when it is a checkpoint in one."""
    parts = [part for part in path.resolve().parts if part not in ("release", "checkpoints")]
    return next(part for part in reversed(parts) if not part.startswith("iter_"))
