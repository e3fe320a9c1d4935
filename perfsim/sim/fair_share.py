"""Max-min fair rates by progressive filling."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.sim.link import Flow, Link


def component(start: Iterable[Flow]) -> tuple[list[Flow], list[Link]]:
    """All flows that `start` shares links with, directly or through others, and their links; in a fixed order."""
    flows: dict[Flow, None] = dict.fromkeys(start)
    links: dict[Link, None] = {}
    waiting = list(flows)
    for flow in waiting:  # grows while it is read
        for link in flow.links:
            if link in links:
                continue
            links[link] = None
            for other in link.flows:
                if other not in flows:
                    flows[other] = None
                    waiting.append(other)
    return waiting, list(links)


def fair_rates(flows: Sequence[Flow], links: Sequence[Link]) -> list[float]:
    """The max-min fair rate of each of `flows`, bytes/s; `links` are all the links of those flows.

    All rates rise together; where a link is full or a flow reaches its own cap, those flows stop and the others rise
    on (progressive filling: Bertsekas and Gallager, Data Networks, 2nd ed. 1992, section 6.5.2). The result is the one
    allocation in which every flow is at its cap or crosses a full link on which no flow is faster. Costs
    O(full links x links + path lengths). Neglected: round-trip-time bias and packet effects of real transports.
    """
    left = {link: link.bytes_per_s for link in links}
    rising = {link: len(link.flows) for link in links}
    rates: dict[Flow, float] = {}
    capped = sorted((flow for flow in flows if flow.cap < float("inf")), key=lambda flow: flow.cap, reverse=True)
    level = 0.0
    while len(rates) < len(flows):
        share, full = float("inf"), None
        for link, count in rising.items():
            if count and left[link] / count < share:
                share, full = left[link] / count, link
        while capped and capped[-1] in rates:
            capped.pop()
        # Rounding in `left` may put a share a hair below the level that all rising flows have reached already.
        if capped and (full is None or capped[-1].cap <= share):
            level, stopped = max(level, capped[-1].cap), [capped.pop()]
        elif full is not None:
            level, stopped = max(level, share), [flow for flow in full.flows if flow not in rates]
        else:
            raise ValueError("a flow has neither a link nor a rate cap, so its rate is unbounded")
        for flow in stopped:
            rates[flow] = level
            for link in flow.links:
                left[link] = max(left[link] - level, 0.0)
                rising[link] -= 1
    return [rates[flow] for flow in flows]
