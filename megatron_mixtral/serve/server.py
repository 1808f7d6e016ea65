"""Our engine behind HTTP: every rank loads its part of the model, rank 0 answers, and all of them end together.

It ends with 0 on SIGTERM or the early warning, after a drain; with 1, and word to every client, when a rank dies.
"""

import functools
import logging
import os
import queue
import socket
import threading
import time
from pathlib import Path
from typing import Any

from megatron_mixtral.checkpoint import loading
from megatron_mixtral.errors import InputError
from megatron_mixtral.mcore import ranks
from megatron_mixtral.model import build, fp8
from megatron_mixtral.observability.events import EventLog
from megatron_mixtral.observability.progress import CopyProgress
from megatron_mixtral.serve import admission, announce, metrics
from megatron_mixtral.serve.engine import json_grammar, leader, links
from megatron_mixtral.serve.engine.replica import Replica, Sizes
from megatron_mixtral.serve.http import app, bounds, requests, uvicorn_thread
from megatron_mixtral.serve.setup import Setup, on_signal
from megatron_mixtral.spec import rundir

GRACE_SECONDS = 3.0  # between a rank's death and ours: clients and `/health` get to say so


def run(setup: Setup, run_dir: Path, listener: socket.socket | None) -> None:
    """Serve until told to stop, as the rank that `setup` says; the first one has a `listener`.

    `InputError` for what this GPU can't do.
    """
    if setup.config.fp8_experts and (reason := fp8.missing()):
        raise InputError(f"fp8_experts: {reason}")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.WARNING)
    if listener is None:
        return _follow(setup)
    uvicorn_thread.allow_many_connections()
    return Server(setup, run_dir, listener).run()


def load(setup: Setup, log: EventLog) -> Any:
    """This rank's replica of the model."""
    config, started = setup.config, time.monotonic()
    ranks.initialize(config.layout)
    part = build.build(
        setup.shape,
        config.layout,
        precision=config.precision,
        random_weights=False,
        fp8_experts=config.fp8_experts,
    )
    if config.fp8_experts and setup.rank == 0:
        print(fp8.describe(part.decoder.layers[0].mlp.experts), flush=True)
    progress = CopyProgress(loading.size(part), label="loading", events=log)
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
        self._address = announce.Address(
            run_dir=run_dir,
            host=setup.config.host,
            port=listener.getsockname()[1],
            wanted=setup.config.port,
            key=setup.key is not None,
        )
        self._log = EventLog(run_dir / rundir.EVENTS)
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._http: Any = None
        self._lost = threading.Event()

    def run(self) -> None:
        """Until a drain ends; whoever dies first, `server.json` doesn't outlive the service."""
        on_signal(self._told_to_stop)
        replica = load(self._setup, self._log)
        connections = links.meet(0, self._setup.world, on_lost=self._rank_lost, on_terminate=self._told_to_stop)
        try:
            self._serve(replica, connections)
        finally:
            self._address.remove()
            for link in connections.values():
                link.close()
        self._log.write("exit", code=0, reason="stopped")
        replica.close()
        ranks.shutdown()

    def _serve(self, replica: Any, connections: dict[int, Any]) -> None:
        places = leader.RankMap.survey()
        self._http = self._http_thread(places.replicas)
        self._http.start()
        self._address.announce(self._log, model=self._setup.name, weights=self._setup.folder)
        engine = leader.Leader(replica, places, connections, inbox=self._inbox, sink=self._http.deliver)
        try:
            engine.run()
        except Exception as error:
            logging.exception("the engine failed")
            self._give_up(f"the engine failed: {type(error).__name__}: {error}")
            threading.Event().wait()  # `_give_up` ends the process
        self._http.join()

    def _http_thread(self, replicas: int) -> Any:
        config, running = self._setup.config, self._setup.config.max_batch * replicas
        limits = admission.Limits(
            context=config.max_tokens,
            running=running,
            queued=config.queue,
            tokens=running * config.max_tokens + config.queue_tokens,
        )
        room = admission.Service(limits, self._inbox.put, metrics.Metrics())
        model = requests.ServedModel(
            name=self._setup.name,
            tokenizer=self._setup.words,
            form=self._setup.form,
            vocab_size=self._setup.shape.vocab_size,
            created=int((self._setup.folder / "config.json").stat().st_mtime),
            bounds=bounds.of(self._setup.words, config.max_tokens),
        )
        application = app.application(model, room, key=self._setup.key)
        return uvicorn_thread.HttpThread(self._listener, room, application, inbox=self._inbox)

    def _told_to_stop(self) -> None:
        """SIGTERM or the early warning, here or on another rank."""
        if self._http is None:
            os._exit(0)  # still loading: nobody waits for anything
        if self._lost.is_set():
            return  # `_give_up` ends it; whoever starts the ranks tells all of them to go when one has died
        self._http.drain(self._setup.config.drain_seconds)

    def _rank_lost(self, rank: int) -> None:
        self._give_up(f"rank {rank} of the engine is gone")

    def _give_up(self, reason: str) -> None:
        """Tell the clients and go; the thread that computes may hang for ever with the dead rank."""
        if self._lost.is_set():
            return
        self._lost.set()
        logging.error("%s", reason)
        if self._http is not None:
            self._http.fail(reason)
        self._address.remove()
        self._log.write("exit", code=1, reason=reason)
        threading.Timer(GRACE_SECONDS if self._http is not None else 0, os._exit, (1,)).start()


def _follow(setup: Setup) -> None:
    """Every other rank: it ends when rank 0 says so or is gone, never by itself."""
    connections: dict[int, Any] = {}
    on_signal(lambda: connections[0].send({"terminate": True}) if connections else os._exit(0))
    replica = load(setup, EventLog(None))
    connections.update(links.meet(setup.rank, setup.world, on_lost=lambda _: _leave_soon()))
    places = leader.RankMap.survey()
    leader.follow(replica, connections[0], speaks=places.speaks[setup.rank])
    replica.close()
    ranks.shutdown()


def _leave_soon() -> None:
    """Rank 0 is gone; this rank may hang in a collective with it, so its own thread can't be waited for."""
    threading.Timer(1.0, os._exit, (1,)).start()
