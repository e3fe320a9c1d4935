"""Replicas that fail and come back: everything in them is lost and sent again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from perfsim.serving.fleet import FAILED, OFF, Replica
from perfsim.sim.clock import call_at
from perfsim.sim.failures import outages

if TYPE_CHECKING:
    from perfsim.serving.cluster import Cluster
    from perfsim.spec.deployment import Failures

_TIMER = 2


class Outages:
    """A renewal process per replica; a replica that is switched off cannot fail, one that starts or drains can.

    A failure while a replica is down or off passes unnoticed. A replica that fails while it drains is switched off. The
    step in which it fails still ends, and it is not back before that.
    """

    def __init__(self, cluster: Cluster, spec: Failures, *, seed: int) -> None:
        self._cluster = cluster
        self._spec = spec
        self._seed = seed

    def watch(self, replica: Replica) -> None:
        """From now on the replica can fail."""
        spec, now = self._spec, self._cluster.env.now
        times = outages(self._seed, replica.index, mtbf=spec.mtbf, repair=spec.repair)
        self._next(replica, ((now + down, now + up) for down, up in times))

    def _next(self, replica: Replica, times: Iterator[tuple[float, float]]) -> None:
        down, up = next(times)
        while down < self._cluster.env.now:
            down, up = next(times)
        call_at(self._cluster.env, down, partial(self._down, replica, times, down, up), priority=_TIMER)

    def _down(self, replica: Replica, times: Iterator[tuple[float, float]], down: float, up: float, _: Any) -> None:
        cluster = self._cluster
        cluster.catch_up(down)
        if replica.state == OFF or (cluster.closed and not cluster.outstanding):
            return
        replica.failures += 1
        cluster.mark(replica, "failed", down)
        draining = replica.state == "draining"
        cluster.withdraw(replica, OFF if draining else FAILED, down)
        lost = replica.engine.fail(down)
        replica.load = 0
        cluster.note(replica)
        if cluster.handover is not None:
            lost += cluster.handover.broken(replica, down)
        cluster.retry(lost, down)
        ends = [scheduler.done.end() for scheduler in replica.schedulers if scheduler.done is not None]
        up = max(up, *ends) if ends else up
        if not draining:
            call_at(cluster.env, up, partial(self._up, replica, times, up), priority=_TIMER)

    def _up(self, replica: Replica, times: Iterator[tuple[float, float]], up: float, _: Any) -> None:
        if replica.state == FAILED:
            self._cluster.mark(replica, "restored", up)
            self._cluster.serve(replica, up)
            self._next(replica, times)
