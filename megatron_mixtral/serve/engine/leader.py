"""Keeps all ranks in step: rank 0 gives requests to replicas and starts each step, and the other ranks follow.

If experts are divided over replicas, all replicas take part in every step; one without work does an idle step.
"""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from megatron_mixtral.distributed import collectives
from megatron_mixtral.mcore import ranks
from megatron_mixtral.serve.engine.links import RankLink
from megatron_mixtral.serve.messages import Cancel, Event, Instruction, Order, Request, StepReport, Stop

from megatron.core import parallel_state


class Replica(Protocol):
    """What a rank needs of its copy of the model; see `replica.Replica`."""

    @property
    def busy(self) -> bool: ...

    @property
    def cache_used(self) -> float: ...

    def add(self, request: Request) -> None: ...

    def cancel(self, request: int) -> None: ...

    def step(self) -> list[Event]: ...

    def idle_step(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RankMap:
    """Each rank's replica, and the rank of each replica that reports for it."""

    replica_of: list[int]
    speaks: list[bool]
    coupled: bool  # experts are divided over replicas

    @classmethod
    def survey(cls) -> "RankMap":
        """Ask all ranks; every rank calls it."""
        state = parallel_state
        mine = (
            ranks.data_parallel()[0],
            state.get_tensor_model_parallel_rank() == 0 and state.get_pipeline_model_parallel_rank() == 0,
        )
        replicas, speaks = zip(*collectives.gathered(mine), strict=True)
        coupled = state.get_expert_model_parallel_world_size() > 1 and max(replicas) > 0
        return cls(replica_of=list(replicas), speaks=list(speaks), coupled=coupled)

    @property
    def replicas(self) -> int:
        return max(self.replica_of) + 1

    def speaker(self, replica: int) -> int:
        ranks = enumerate(zip(self.replica_of, self.speaks, strict=True))
        return next(rank for rank, place in ranks if place == (replica, True))


class Leader:
    """Rank 0: requests from `inbox` go to the replica with the fewest requests, and all results go to `sink`."""

    def __init__(
        self,
        replica: Replica,
        places: RankMap,
        links: dict[int, RankLink],
        *,
        inbox: "queue.SimpleQueue[Order]",
        sink: Callable[[list[Event], float], None],
    ) -> None:
        self._replica = replica
        self._places = places
        self._links = links
        self._inbox = inbox
        self._sink = sink
        self._replica_of: dict[int, int] = {}  # request -> replica
        self._busy = [False] * places.replicas
        self._cache = [0.0] * places.replicas

    def run(self) -> None:
        """Run until a `Stop`; a lost link or a failed step raises its error."""
        while True:
            orders = self._orders()
            if any(isinstance(order, Stop) for order in orders):
                break
            self._step(orders)
        for link in self._links.values():
            link.expect_end()
            link.send({"stop": True})

    def _orders(self) -> list[Order]:
        """All orders so far; waits for one if no replica has work."""
        orders: list[Order] = []
        try:
            if not any(self._busy):
                orders.append(self._inbox.get())
            while True:
                orders.append(self._inbox.get_nowait())
        except queue.Empty:
            return orders

    def _step(self, orders: list[Order]) -> None:
        work = self._divided(orders)
        together = self._places.coupled and any(mine.step for mine in work)
        for rank, link in self._links.items():
            mine = work[self._places.replica_of[rank]]
            if mine.step or together:
                link.send(mine.to_json())
        events: list[Event] = []
        if work[0].step or together:
            events += self._noted(0, perform(self._replica, work[0]))
        for of in range(1, len(work)):
            if work[of].step:
                report = self._links[self._places.speaker(of)].receive()
                events += self._noted(of, StepReport.from_json(report))
        self._sink(events, max(self._cache))

    def _divided(self, orders: list[Order]) -> list[Instruction]:
        """What each replica is to do."""
        work = [Instruction() for _ in self._busy]
        for order in orders:
            if isinstance(order, Request):
                work[self._assign(order)].add.append(order)
            elif isinstance(order, Cancel) and order.request in self._replica_of:
                work[self._replica_of.pop(order.request)].cancel.append(order.request)
        for mine, busy in zip(work, self._busy, strict=True):
            mine.step = busy or bool(mine.add or mine.cancel)
        return work

    def _assign(self, request: Request) -> int:
        counts = [0] * len(self._busy)
        for replica in self._replica_of.values():
            counts[replica] += 1
        self._replica_of[request.id] = chosen = counts.index(min(counts))
        return chosen

    def _noted(self, of: int, report: StepReport) -> list[Event]:
        self._busy[of], self._cache[of] = report.busy, report.cache
        for event in report.events:
            if event.finish:
                self._replica_of.pop(event.request, None)
        return report.events


def follow(replica: Replica, link: RankLink, *, speaks: bool) -> None:
    """Any other rank: follow rank 0's orders until it sends stop."""
    while True:
        order = link.receive()
        if order.get("stop"):
            link.expect_end()
            return
        work = Instruction.from_json(order)
        report = perform(replica, work)
        if speaks and work.step:
            link.send(report.to_json())


def perform(replica: Replica, work: Instruction) -> StepReport:
    """Do it on this rank."""
    for request in work.add:
        replica.add(request)
    for cancelled in work.cancel:
        replica.cancel(cancelled)
    events: list[Event] = []
    if work.step:
        events = replica.step()
    else:
        replica.idle_step()
    return StepReport(events, replica.busy, replica.cache_used)
