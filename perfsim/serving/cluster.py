"""Replicas behind a router, on SimPy's clock; to its drivers a cluster looks like one engine.

Arrivals, transfers, failures and scaling are SimPy events, engine steps are not: an engine is advanced only when
something outside depends on it, and always up to that moment. Without anybody who waits for answers (an open loop on
replicas of role `both`) that is when a request comes in, for its own replica or, if the router looks at loads, for all
that have something to show. With closed loops, sessions and disaggregation a completion causes something, so the next
visible moment of any engine is an event as well: `watch`.

At equal times arrivals come before engine boundaries, which see them, as in `Engine.advance`; transfers and timers
(failures, scaling) come last. Among equals the order is that of the calls, prefill replicas before decode replicas.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from perfsim.serving.autoscaler import Autoscaler
from perfsim.serving.disaggregation import Handover
from perfsim.serving.fleet import FAILED, SERVING, STARTING, Replica
from perfsim.serving.outages import Outages
from perfsim.serving.request import Request
from perfsim.serving.router import make_router
from perfsim.serving.timing import TIME_EPS, nanosecond
from perfsim.sim.clock import CountingEnvironment, call_at

if TYPE_CHECKING:
    from perfsim.serving.replica import GroupPlan
    from perfsim.serving.trace import Trace
    from perfsim.spec.deployment import Deployment

Hook = Callable[[Request, float], None]
ARRIVAL, BOUNDARY, TIMER = 0, 1, 2


class Cluster:
    """`submit` requests in time order, `advance` to a time, `drain` at the end; a hook may lower `until`.

    `build(replica)` makes a replica's engine. `on_finish` is called for every request that got its answer, was rejected
    or has failed for good. `sent`, `finished` (rejected ones included), `failed` and `retried` count requests, `unused`
    seconds that requests spent in prefill engines for nothing.
    """

    def __init__(
        self, groups: Sequence[GroupPlan], *, deployment: Deployment, seed: int, build: Callable[[Replica], Any],
        on_finish: Hook | None = None, trace: Trace | None = None, begin: Callable[[float], None] | None = None,
    ) -> None:  # fmt: skip
        self.env = CountingEnvironment()
        self.until = float("-inf")
        self.replicas: list[Replica] = []
        self.trace = trace
        self.sent = self.finished = self.failed = self.retried = 0
        self.submissions = 0  # requests given to replicas, those handed over or tried again counted again
        self.unused_seconds = 0.0
        self.closed = False  # no more requests will come
        self._build = build
        self._begin = begin
        self._on_finish = on_finish
        self._retries: dict[int, int] = {}
        self._max_retries = deployment.failures.max_retries if deployment.failures else 0
        self._visible: list[tuple[float, int]] = []  # when each engine has something to show next
        self._armed: Any = None
        self._armed_at = float("inf")
        self._counts: dict[str, int] = {}  # replicas so far, by group
        self._held: deque[Request] = deque()  # no replica serves
        self._open: list[Replica] = []  # take requests from the router
        self._router = make_router(deployment.router, seed=seed)
        self.handover = Handover(self, groups, deployment.transfer) if deployment.disaggregated else None
        self._watch = on_finish is not None or self.handover is not None
        self.outages = None if deployment.failures is None else Outages(self, deployment.failures, seed=seed)
        scaling = deployment.autoscaling
        self.autoscaler = None if scaling is None else Autoscaler(self, groups[0], scaling)
        for group in groups:
            count = self.autoscaler.first(group.group.count) if self.autoscaler is not None else group.group.count
            for _ in range(count):
                self.serve(self.add(group, 0.0), 0.0)

    @property
    def outstanding(self) -> int:
        """Requests that came in and are not done yet, as far as engines have been advanced."""
        return self.sent - self.finished - self.failed

    # --- what drivers call ------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A request reaches the router at `request.queued`; never before what `advance` has passed."""
        if not self.sent and self._begin is not None:
            self._begin(request.queued)
        self.sent += 1
        # A nanosecond early, so that engine boundaries in that nanosecond see it, as they would in one engine; in whole
        # nanoseconds, so that rounding does not reorder what comes at the same time.
        time = (nanosecond(request.queued) - 1) * TIME_EPS
        call_at(self.env, time, partial(self._arrive, request), priority=ARRIVAL)

    def advance(self, until: float) -> None:
        """Let everything happen that comes before `until`."""
        self.until = until
        env, forever = self.env, float("inf")
        while env.peek() < self.until - TIME_EPS and (self.until < forever or self._unfinished()):
            env.step()

    def _unfinished(self) -> bool:
        return self.outstanding > 0 or (self.handover is not None and self.handover.owed > 0)

    def drain(self) -> None:
        """Run until every request is done."""
        self.closed = True
        self.advance(float("inf"))
        self.catch_up(float("inf"))
        if self.outstanding:
            raise RuntimeError(f"{self.outstanding} requests were left in the cluster: a scheduling bug")
        for replica in self.replicas:
            if replica.state != FAILED:
                replica.engine.drain()

    # --- engines ----------------------------------------------------------------------------------------------------

    def catch_up(self, until: float) -> None:
        """Advance every engine that has something to show before `until`."""
        visible, replicas, limit = self._visible, self.replicas, until - TIME_EPS
        while visible and visible[0][0] < limit:
            at, index = heappop(visible)
            replica = replicas[index]
            if replica.next_at == at:
                replica.next_at = float("inf")
                replica.engine.advance(until)
                self.note(replica)

    def note(self, replica: Replica) -> None:
        """Write down when an engine has something to show next; call it after everything that may change that."""
        at = replica.engine.next_event()
        if at == replica.next_at:
            return
        replica.next_at = at
        if at < float("inf"):
            heappush(self._visible, (at, replica.index))
            if self._watch and at < self._armed_at:
                self._arm()

    def _arm(self) -> None:
        self._armed_at = self._visible[0][0]
        self._armed = call_at(self.env, self._armed_at, self._boundary, priority=BOUNDARY)

    def _boundary(self, event: Any) -> None:
        if event is not self._armed:
            return  # an earlier one has come in between
        at, self._armed_at = self._armed_at, float("inf")
        due = []
        while self._visible and self._visible[0][0] < at + TIME_EPS:
            time, index = heappop(self._visible)
            if self.replicas[index].next_at == time:
                self.replicas[index].next_at = float("inf")
                due.append(self.replicas[index])
        due.sort(key=_upstream)
        for replica in due:
            replica.engine.advance(at + 2 * TIME_EPS)  # steps are longer: exactly the boundary at this moment
            self.note(replica)
        if self._visible and self._visible[0][0] < self._armed_at:
            self._arm()

    # --- requests ---------------------------------------------------------------------------------------------------

    def _arrive(self, request: Request, _: Any) -> None:
        self.dispatch(request, request.queued)

    def dispatch(self, request: Request, at: float) -> None:
        """Route a request at a time in seconds, or hold it until a replica serves."""
        if not self._open:
            self._held.append(request)
            return
        if self._router.needs_loads:
            self.catch_up(at)
        self.send(request, self._router.choose(request, self._open), at)

    def send(self, request: Request, replica: Replica, at: float) -> None:
        """Give a request to a replica."""
        self.submissions += 1
        replica.load += 1
        replica.dispatched += 1
        replica.engine.advance(at)
        replica.engine.submit(request)
        self.note(replica)

    def _finish(self, replica: Replica, request: Request, at: float) -> None:
        replica.load -= 1
        self.finished += 1
        if self.handover is not None:
            self.handover.finished(request, at)
        if self.autoscaler is not None and not replica.load:
            self.autoscaler.emptied(replica, at)
        if self._on_finish is not None:
            self._on_finish(request, at)

    def retry(self, requests: Sequence[Request], at: float) -> None:
        """A failure threw these requests out: they start afresh, or have failed for good."""
        for request in sorted(requests, key=lambda request: request.index):
            tries = self._retries.get(request.index, 0) + 1
            if request.received >= 0.0:
                self.unused_seconds += request.queued - request.received
                request.remote, request.received = False, -1.0
            request.reset()
            request.queued = at
            if tries <= self._max_retries:
                self._retries[request.index] = tries
                self.retried += 1
                self.dispatch(request, at)
                continue
            self.failed += 1
            if self._on_finish is not None:
                self._on_finish(request, at)

    # --- replicas ---------------------------------------------------------------------------------------------------

    def add(self, group: GroupPlan, at: float) -> Replica:
        """A new replica, on from `at` seconds and not yet serving."""
        number = self._counts.get(group.group.name, 0)
        self._counts[group.group.name] = number + 1
        replica = Replica(len(self.replicas), f"{group.group.name}/{number}", number, group)
        self.replicas.append(replica)
        replica.engine = self._build(replica)
        for scheduler in replica.schedulers:
            scheduler.on_finish = partial(self._finish, replica)
        if self.handover is not None:
            self.handover.attach(replica)
        replica.enter(STARTING, at)
        if self.outages is not None:
            self.outages.watch(replica)
        return replica

    def serve(self, replica: Replica, at: float) -> None:
        """A replica takes requests from now on; what was held goes out at once."""
        replica.enter(SERVING, at)
        side = self._side(replica)
        side.append(replica)
        side.sort(key=lambda replica: replica.index)
        if self.handover is not None:
            self.handover.serves(replica, at)
        for _ in range(len(self._held) if self._open else 0):
            request = self._held.popleft()
            request.queued = max(request.queued, at)
            self.dispatch(request, at)

    def withdraw(self, replica: Replica, state: str, at: float) -> None:
        """A replica takes no more requests."""
        if replica.serving:
            self._side(replica).remove(replica)
            self._router.forget(replica)
        replica.enter(state, at)

    def mark(self, replica: Replica, text: str, at: float) -> None:
        """Tell the trace what happened to a replica."""
        if self.trace is not None:
            self.trace.mark(replica.name, text, at)

    def _side(self, replica: Replica) -> list[Replica]:
        if self.handover is not None and replica.plan.group.role == "decode":
            return self.handover.decoders
        return self._open


def _upstream(replica: Replica) -> tuple[bool, int]:
    """At one moment prefill replicas come first: what they hand over is seen by the decode replicas' boundaries."""
    return replica.plan.group.role == "decode", replica.index
