"""Links whose bandwidth flows share max-min fairly, on SimPy's clock.

    network = FairNetwork(env)
    network.add_link("node0.nic0.out", 50e9)
    network.add_link("node1.nic0.in", 50e9)
    flow = network.transfer(["node0.nic0.out", "node1.nic0.in"], 2e9, latency=5e-6, callback=on_arrival)
    ...
    network.cancel(flow)          # a replica failed: what was sent so far stays counted on the links
    yield flow.event              # for generator processes; costs one more SimPy event

A transfer is a fluid: `bytes` at the fair rate over all links of its path at once. Alone on the wire it takes exactly
`latency + bytes / min(bandwidths, cap)`. The links are free when the last byte has left; the flow is done, and
`callback(flow)` called, when that byte has arrived, `latency` later. A full-duplex wire is two links. When a flow
starts or ends, only the flows connected with it through shared links get new rates. Flows that end at the same time
end in the order in which they started, after all of them have left the links.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from perfsim.sim.clock import call_at
from perfsim.sim.fair_share import component, fair_rates

if TYPE_CHECKING:
    from simpy import Environment, Event


class Link:
    """One direction of a wire: `bytes_per_s` shared by `flows`; `carried` bytes and `busy_s` seconds until `since`."""

    __slots__ = ("busy_s", "bytes_per_s", "carried", "flows", "idle_at", "name", "peak_flows")

    def __init__(self, name: str, bytes_per_s: float) -> None:
        self.name = name
        self.bytes_per_s = bytes_per_s
        self.flows: dict[Flow, None] = {}
        self.carried = 0.0
        self.busy_s = 0.0
        self.peak_flows = 0
        self.idle_at: float | None = None  # when the running busy period began


@dataclass(frozen=True, slots=True)
class LinkStats:
    """What a link did so far: bytes carried, seconds with at least one flow, most flows at once."""

    name: str
    bytes_per_s: float
    bytes: float
    busy_s: float
    peak_flows: int


class Flow:
    """One transfer: `bytes` over `path`; `rate` is its present share, `sent_s` and `finish` are None until then."""

    __slots__ = ("_event", "bytes", "callback", "cancelled", "cap", "due", "finish", "id", "latency", "left", "links",
                 "network", "rate", "sent_s", "since", "start", "tag")  # fmt: skip

    def __init__(self, network: FairNetwork, number: int, links: tuple[Link, ...], size: float, latency: float,
                 cap: float, callback: Callable[[Flow], None] | None, tag: object) -> None:  # fmt: skip
        self.network, self.id, self.links, self.bytes = network, number, links, size
        self.latency, self.cap, self.callback, self.tag = latency, cap, callback, tag
        self.start = self.since = network.env.now
        self.left = size
        self.rate = 0.0
        self.due = math.inf
        self.sent_s: float | None = None
        self.finish: float | None = None
        self.cancelled = False
        self._event: Event | None = None

    @property
    def path(self) -> tuple[str, ...]:
        """Names of the links it crosses."""
        return tuple(link.name for link in self.links)

    @property
    def event(self) -> Event:
        """A SimPy event that succeeds, with the flow as its value, on arrival; never for a cancelled flow."""
        if self._event is None:
            self._event = self.network.env.event()
            if self.finish is not None:
                self._event.succeed(self)
        return self._event


class FairNetwork:
    """Links by name, and the flows on them.

    One SimPy event is pending per network for the next flow to end, plus one per flow with latency; an event that a
    new flow has made too early finds nothing to do and rearms. `observer(flow)` is called for every flow that ends or
    is cancelled, before its callback: traces hang here.
    """

    def __init__(self, env: Environment, *, observer: Callable[[Flow], None] | None = None) -> None:
        self.env = env
        self._observer = observer
        self._links: dict[str, Link] = {}
        self._due: list[tuple[float, int, Flow]] = []
        self._armed: Event | None = None
        self._armed_at = math.inf
        self._started = 0
        self.active = 0

    def add_link(self, name: str, bytes_per_s: float) -> None:
        """Add an idle link; ValueError when the name is taken or the bandwidth is not a positive number."""
        if name in self._links:
            raise ValueError(f"there is already a link '{name}'")
        if not 0.0 < bytes_per_s < math.inf:
            raise ValueError(f"link '{name}': bandwidth must be positive and finite, got {bytes_per_s!r}")
        self._links[name] = Link(name, float(bytes_per_s))

    def has_link(self, name: str) -> bool:
        return name in self._links

    def set_bandwidth(self, name: str, bytes_per_s: float) -> None:
        """Change a link's bandwidth from now on; 0 is a broken link, whose flows wait."""
        if not 0.0 <= bytes_per_s < math.inf:
            raise ValueError(f"link '{name}': bandwidth must be finite and not negative, got {bytes_per_s!r}")
        link = self._links[name]
        link.bytes_per_s = float(bytes_per_s)
        self._share(list(link.flows))
        self._arm()

    def transfer(self, path: Sequence[str], bytes: float, latency: float = 0.0,
                 callback: Callable[[Flow], None] | None = None, *, cap: float = math.inf,
                 tag: object = None) -> Flow:  # fmt: skip
        """Start a flow of `bytes` over the links of `path` (order does not matter); `callback(flow)` on arrival.

        `cap` bounds its rate in bytes/s, as an endpoint or a copy engine would; `tag` is the caller's. A flow of zero
        bytes only has its latency. Raises KeyError for an unknown link, ValueError for a path that repeats a link, a
        flow without any bound on its rate, or negative amounts.
        """
        links = tuple(self._links[name] for name in path)
        if len(set(links)) < len(links):
            raise ValueError(f"path {list(path)} crosses a link twice")
        if not (0.0 <= bytes < math.inf and 0.0 <= latency < math.inf and cap > 0.0):
            raise ValueError(f"a flow of {bytes!r} bytes, latency {latency!r}, rate cap {cap!r}")
        if bytes and not links and cap == math.inf:
            raise ValueError("a flow without links needs a rate cap")
        flow = Flow(self, self._started, links, float(bytes), float(latency), float(cap), callback, tag)
        self._started += 1
        self.active += 1
        if not bytes:
            self._sent([flow])
            return flow
        now = self.env.now
        for link in links:
            if not link.flows:
                link.idle_at = now
            link.flows[flow] = None
            link.peak_flows = max(link.peak_flows, len(link.flows))
        self._share([flow])
        self._arm()
        return flow

    def cancel(self, flow: Flow) -> None:
        """Stop a flow: no callback, and its links are shared by the others from now on; nothing when it has ended."""
        if flow.finish is not None or flow.cancelled:
            return
        flow.cancelled = True
        self.active -= 1
        if flow.sent_s is None:
            self._settle(flow)
            self._leave([flow])
            self._arm()
        if self._observer is not None:
            self._observer(flow)

    def remaining(self, flow: Flow) -> float:
        """Bytes of `flow` that have not left yet."""
        return max(flow.left - flow.rate * (self.env.now - flow.since), 0.0) if flow.sent_s is None else 0.0

    def stats(self) -> list[LinkStats]:
        """What each link did until now, in the order in which they were added."""
        now, found = self.env.now, []
        for link in self._links.values():
            for flow in link.flows:
                self._settle(flow)
            busy = link.busy_s + (now - link.idle_at if link.idle_at is not None else 0.0)
            found.append(LinkStats(link.name, link.bytes_per_s, link.carried, busy, link.peak_flows))
        return found

    def _settle(self, flow: Flow) -> None:
        """Account for what `flow` has sent at its present rate; its end does not move."""
        moved = min(flow.rate * (self.env.now - flow.since), flow.left)
        flow.since = self.env.now
        flow.left -= moved
        for link in flow.links:
            link.carried += moved

    def _share(self, changed: Sequence[Flow]) -> None:
        """New rates for all flows connected with `changed`; the caller arms."""
        if len(changed) == 1 and all(len(link.flows) == 1 for link in changed[0].links):  # alone on its wires
            flow = changed[0]
            rate = min([flow.cap, *[link.bytes_per_s for link in flow.links]])
            if rate != flow.rate:
                self._set_rate(flow, rate)
            return
        flows, links = component(changed)
        for flow, rate in zip(flows, fair_rates(flows, links), strict=True):
            if rate != flow.rate:  # else its end stays where it is, to the bit
                self._set_rate(flow, rate)

    def _set_rate(self, flow: Flow, rate: float) -> None:
        self._settle(flow)
        flow.rate = rate
        flow.due = flow.since + flow.left / rate if rate else math.inf
        if rate:
            heapq.heappush(self._due, (flow.due, flow.id, flow))

    def _arm(self) -> None:
        """See to it that an event is pending no later than the next end."""
        due = self._due
        while due and due[0][0] != due[0][2].due:
            heapq.heappop(due)  # a rate that has changed since
        if due and due[0][0] < self._armed_at:
            self._armed_at = due[0][0]
            self._armed = call_at(self.env, self._armed_at, self._wake)

    def _wake(self, event: Event) -> None:
        if event is not self._armed:
            return  # a new event came before this one
        now, due = max(self._armed_at, self.env.now), self._due
        self._armed, self._armed_at = None, math.inf
        ended = []
        while due and due[0][0] <= now:
            at, _, flow = heapq.heappop(due)
            if at == flow.due:
                flow.due = math.inf  # a rate that went and came back leaves two equal entries
                ended.append(flow)
        if ended:
            ended.sort(key=lambda flow: flow.id)
            for flow in ended:
                # The last bytes by subtraction: what rounding left over belongs to this flow as well.
                for link in flow.links:
                    link.carried += flow.left
                flow.left, flow.since = 0.0, self.env.now
            self._leave(ended)
        self._arm()
        self._sent(ended)

    def _leave(self, flows: Sequence[Flow]) -> None:
        """Take flows off their links and share these among those that stay."""
        touched: dict[Link, None] = {}
        for flow in flows:
            flow.due, flow.rate = math.inf, 0.0
            for link in flow.links:
                del link.flows[flow]
                touched[link] = None
                if not link.flows and link.idle_at is not None:
                    link.busy_s += self.env.now - link.idle_at
                    link.idle_at = None
        left = [flow for link in touched for flow in link.flows]
        if left:
            self._share(left)

    def _sent(self, flows: Sequence[Flow]) -> None:
        for flow in flows:
            flow.sent_s = self.env.now
        for flow in flows:
            if flow.latency or not flow.bytes:
                call_at(self.env, self.env.now + flow.latency, partial(self._arrived, flow))
            else:
                self._arrived(flow)

    def _arrived(self, flow: Flow, _: Event | None = None) -> None:
        if flow.cancelled:
            return
        flow.finish = self.env.now
        self.active -= 1
        if self._observer is not None:
            self._observer(flow)
        if flow.callback is not None:
            flow.callback(flow)
        if flow._event is not None:
            flow._event.succeed(flow)
