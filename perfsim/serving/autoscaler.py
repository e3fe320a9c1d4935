"""More replicas when requests pile up, fewer when they have not for a while: Kubernetes' horizontal autoscaler."""

from __future__ import annotations

from collections import deque
from functools import partial
from math import ceil
from typing import TYPE_CHECKING, Any

from perfsim.serving.fleet import DRAINING, FAILED, OFF, SERVING, STARTING, Replica
from perfsim.sim.clock import call_at

if TYPE_CHECKING:
    from perfsim.serving.cluster import Cluster
    from perfsim.serving.replica import GroupPlan
    from perfsim.spec.deployment import Autoscaling

_TIMER = 2


class Autoscaler:
    """Every `interval` seconds: ceil(requests in flight / target) replicas are wanted, within the bounds.

    Scaling up brings draining replicas back first, then starts new ones, with empty caches. Scaling down follows the
    most that was wanted during the last `scale_down_delay` seconds (Kubernetes' stabilisation window): replicas that
    still start are cancelled, then the newest ones drain. Failed replicas count: they come back.
    """

    def __init__(self, cluster: Cluster, group: GroupPlan, spec: Autoscaling) -> None:
        self._cluster = cluster
        self._group = group
        self._spec = spec
        self._wanted: deque[tuple[float, int]] = deque()
        self.started = self.drained = 0
        self._at(spec.interval)

    def first(self, count: int) -> int:
        """Replicas to begin with."""
        return min(max(count, self._spec.min_replicas), self._spec.max_replicas)

    def emptied(self, replica: Replica, at: float) -> None:
        """A replica has nothing left to do; one that drains is switched off."""
        if replica.state == DRAINING:
            replica.enter(OFF, at)
            self._cluster.mark(replica, "off", at)

    def _at(self, time: float) -> None:
        call_at(self._cluster.env, time, partial(self._tick, time), priority=_TIMER)

    def _tick(self, now: float, _: Any) -> None:
        cluster, spec = self._cluster, self._spec
        cluster.catch_up(now)
        if cluster.closed and not cluster.outstanding:
            return
        self._at(now + spec.interval)
        wanted = min(max(ceil(cluster.outstanding / spec.target), spec.min_replicas), spec.max_replicas)
        self._wanted.append((now, wanted))
        while self._wanted[0][0] < now - spec.scale_down_delay:
            self._wanted.popleft()
        have = [replica for replica in cluster.replicas if replica.state in (STARTING, SERVING, FAILED)]
        allowed = max(count for _, count in self._wanted)
        if wanted > len(have):
            self._grow(wanted - len(have), now)
        elif allowed < len(have):
            self._shrink([replica for replica in have if replica.state != FAILED], len(have) - allowed, now)

    def _grow(self, count: int, now: float) -> None:
        cluster = self._cluster
        for replica in [replica for replica in cluster.replicas if replica.state == DRAINING][:count]:
            cluster.mark(replica, "drain cancelled", now)
            cluster.serve(replica, now)
            count -= 1
        for _ in range(count):
            replica = cluster.add(self._group, now)
            self.started += 1
            cluster.mark(replica, "starting", now)
            at = now + self._spec.startup_delay
            call_at(cluster.env, at, partial(self._up, replica, at), priority=_TIMER)

    def _up(self, replica: Replica, at: float, _: Any) -> None:
        if replica.state == STARTING:
            self._cluster.mark(replica, "serving", at)
            self._cluster.serve(replica, at)

    def _shrink(self, replicas: list[Replica], count: int, now: float) -> None:
        cluster = self._cluster
        replicas.sort(key=lambda replica: (replica.state != STARTING, -replica.index))
        for replica in replicas[:count]:
            self.drained += 1
            starting = replica.state == STARTING
            cluster.mark(replica, "start cancelled" if starting else "draining", now)
            cluster.withdraw(replica, OFF if starting else DRAINING, now)
            if not starting and not replica.load:
                self.emptied(replica, now)
