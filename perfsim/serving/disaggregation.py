"""Prefill and decode on different replicas: the hand-over of K/V between them, over the network cards of both.

The prefill replica emits the first token and holds the request's blocks until they are fetched. The request queues at
a decode replica, the one with the fewest requests, which first sets blocks aside and then fetches: a full decode pool
pushes back, and blocks held on the prefill side keep it from taking more. Every replica has a link out and a link in,
shared max-min fairly by the transfers on it.

With `layerwise` a layer leaves as soon as it is computed: what is left at the first token is the last layer, or what
the link could not carry during the prefill. Neglected there: that the hidden part takes bandwidth from other
transfers, and that a decode replica must have set blocks aside before the prefill begins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from math import inf
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from perfsim.cost.kv_transfer import TransferModel, transfer_model
from perfsim.serving.fleet import FAILED, Replica
from perfsim.sim.clock import call_at
from perfsim.sim.link import FairNetwork

if TYPE_CHECKING:
    from perfsim.serving.cluster import Cluster
    from perfsim.serving.replica import GroupPlan
    from perfsim.serving.request import Request
    from perfsim.sim.link import Flow
    from perfsim.spec.deployment import KvTransfer


class Move:
    """K/V on their way: `original` waits at `source`, its `sequel` is queued at `target`."""

    __slots__ = ("bytes", "flow", "handed_over", "original", "reserved", "sequel", "source", "target")

    def __init__(self, original: Request, sequel: Request, source: Replica, target: Replica, at: float) -> None:
        self.original, self.sequel = original, sequel
        self.source, self.target = source, target
        self.handed_over = at
        self.reserved = -1.0
        self.bytes = 0.0
        self.flow: Flow | None = None


class Handover:
    """What lies between the first token and the second; `decoders` are the decode replicas that serve.

    `moved` transfers, `bytes` of K/V, `seconds` that they took for `exposed` bytes (all but what a prefill hid) and
    `waited` seconds for blocks on the decode side, summed.
    """

    def __init__(self, cluster: Cluster, groups: Sequence[GroupPlan], spec: KvTransfer) -> None:
        self._cluster = cluster
        self._spec = spec
        self._network = FairNetwork(cluster.env)
        alike = all(group.scenario.hardware == groups[0].scenario.hardware for group in groups)
        alone = sum(group.group.count * group.scenario.parallel.gpus for group in groups) if alike else inf
        self._models: dict[str, TransferModel] = {
            group.group.name: transfer_model(group.scenario, spec, gpus_in_use=alone) for group in groups
        }
        self._moves: dict[Request, Move] = {}
        self._homeless: deque[tuple[Request, Replica, float]] = deque()  # no decode replica serves, since when
        self._dying: list[Request] = []  # first tokens out of the step in which their replica failed
        self.decoders: list[Replica] = []
        self.moved = 0
        self.owed = 0  # blocks of refused requests that will be freed at this very moment
        self.bytes = self.exposed = self.seconds = self.waited = 0.0

    def attach(self, replica: Replica) -> None:
        """A new replica: its links and hooks."""
        bandwidth = self._models[replica.plan.group.name].bandwidth
        for way in ("out", "in"):
            self._network.add_link(f"{replica.name}.{way}", bandwidth)
        for scheduler in replica.schedulers:
            if replica.plan.group.role == "prefill":
                scheduler.on_handover = partial(self._handed_over, replica)
            else:
                scheduler.on_reserve = partial(self._reserved, replica)

    def serves(self, replica: Replica, at: float) -> None:
        """A replica is there; hand over what waited for a decode replica."""
        while self._homeless and self.decoders:
            request, source, since = self._homeless.popleft()
            self._cluster.unused_seconds -= at - since  # the request's, but in no engine
            self._queue(request, source, at)

    def broken(self, replica: Replica, at: float) -> list[Request]:
        """A replica has failed: the requests that lost their K/V with it, in no engine any more."""
        cluster, lost = self._cluster, self._dying
        self._dying = []
        for item in [item for item in self._homeless if item[1] is replica]:
            self._homeless.remove(item)
            lost.append(item[0])
            cluster.unused_seconds += item[2] - item[0].queued
        for move in [move for move in self._moves.values() if replica in (move.source, move.target)]:
            del self._moves[move.sequel]
            if move.flow is not None:
                self._network.cancel(move.flow)
            if move.target is replica:  # its own request was in the engine that failed
                self._fetched(move, at)
                continue
            move.target.load -= 1
            move.target.engine.advance(at)
            move.target.engine.withdraw(move.sequel, at)
            cluster.note(move.target)
            lost.append(move.original)
            cluster.unused_seconds += move.handed_over - move.original.queued
        return lost

    def finished(self, request: Request, at: float) -> None:
        """A request is done; one whose K/V have not moved was rejected by its decode replica, where it never fits."""
        move = self._moves.pop(request, None)
        if move is not None:
            self._cluster.unused_seconds += at - move.original.queued
            # Not at once: the source is in the middle of handing it over.
            self.owed += 1
            call_at(self._cluster.env, at, partial(self._refused, move, at))

    def _handed_over(self, source: Replica, request: Request, at: float) -> None:
        source.load -= 1
        if source.state == FAILED:
            self._cluster.unused_seconds += at - request.queued
            self._dying.append(request)
        elif self.decoders:
            self._queue(request, source, at)
        else:
            self._homeless.append((request, source, at))

    def _queue(self, request: Request, source: Replica, at: float) -> None:
        target = min(self.decoders, key=attrgetter("load"))
        sequel = request.sequel(at)
        self._moves[sequel] = Move(request, sequel, source, target, at)
        self._cluster.send(sequel, target, at)

    def _reserved(self, target: Replica, sequel: Request, at: float) -> None:
        move = self._moves.get(sequel)
        if move is None:
            return  # its source has failed
        move.reserved = at
        source, sink = (self._models[replica.plan.group.name] for replica in (move.source, target))
        size = move.bytes = sink.bytes(sequel.fetched)
        if self._spec.layerwise:
            prefill_s = move.handed_over - move.original.scheduled
            size = max(size / sink.layers, size - min(source.cap, sink.cap) * prefill_s)
        path = (f"{move.source.name}.out", f"{target.name}.in")
        move.flow = self._network.transfer(
            path, size, latency=max(source.latency, sink.latency), callback=partial(self._arrived, move),
            cap=min(source.cap, sink.cap),
        )  # fmt: skip

    def _arrived(self, move: Move, flow: Flow) -> None:
        cluster, at = self._cluster, self._cluster.env.now
        del self._moves[move.sequel]
        self.moved += 1
        self.bytes += move.bytes
        self.exposed += flow.bytes
        self.seconds += at - move.reserved
        self.waited += move.reserved - move.handed_over
        if cluster.trace is not None:
            cluster.trace.transfer("Links", f"{move.source.name} to {move.target.name}",
                                   f"request {move.sequel.index}", move.reserved, at, bytes=flow.bytes)  # fmt: skip
        move.target.engine.advance(at)
        move.target.engine.notify(move.sequel, at)
        cluster.note(move.target)
        self._fetched(move, at)

    def _refused(self, move: Move, at: float, _: Any) -> None:
        self.owed -= 1
        self._fetched(move, at)

    def _fetched(self, move: Move, at: float) -> None:
        """The source may free the blocks."""
        if move.source.state != FAILED:
            move.source.engine.advance(at)
            move.source.engine.notify(move.original, at)
            self._cluster.note(move.source)
