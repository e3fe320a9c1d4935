"""What a simulation needs to draw its timeline; `report.trace_file` writes one for the Perfetto viewer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from perfsim.serving.recorder import Sink
    from perfsim.serving.request import Request
    from perfsim.sim.link import Flow
    from perfsim.spec.policy import ParallelPlan


class Trace(Protocol):
    """A timeline of replicas, links and memory tiers; times are simulated seconds, calls may come in any order."""

    def replica(self, name: str, *, lane: str) -> Sink:
        """A sink for the segments and requests of one scheduler of replica `name`.

        `lane` labels the ranks that run in lock step behind it, such as `TP 0-7`. A replica with a scheduler per
        data-parallel rank takes a sink, and so a lane, for each.
        """
        ...

    def transfer(self, group: str, lane: str, name: str, start_s: float, end_s: float, *, bytes: float) -> None:
        """`bytes` called `name` moving over `lane` (a link, a tier) of a `group` such as `Links` or `KV tiers`."""
        ...

    def mark(self, replica: str, text: str, at_s: float) -> None:
        """A moment in the life of a replica: failed, restored, scaled up."""
        ...


def lane_label(parallel: ParallelPlan, *, dp_rank: int | None = None) -> str:
    """The ranks behind one scheduler, such as `DP 3 x TP 0-7`: they do equal work at the same time, so one lane.

    Of pipeline stages it is the first one: the others do the same later.
    """
    axes = [("DP", parallel.dp if dp_rank is None else 1), ("TP", parallel.tp)]
    shown = [f"{name} 0-{size - 1}" for name, size in axes if size > 1]
    if parallel.pp > 1:
        shown.insert(0, f"PP 0 of {parallel.pp}")
    if dp_rank is not None:
        shown.insert(0, f"DP {dp_rank}")
    return " x ".join(shown) or "GPU 0"


def draw_tier(trace: Trace, name: str) -> Callable[[str, Request, float, float, float], None]:
    """An observer for a KV tier that draws what it loads and stores on two lanes, called after the scheduler `name`."""

    def draw(way: str, request: Request, start_s: float, end_s: float, moved: float) -> None:
        trace.transfer("KV tiers", f"{name} {way}", f"request {request.index}", start_s, end_s, bytes=moved)

    return draw


def draw_flows(trace: Trace, *, group: str = "Links") -> Callable[[Flow], None]:
    """An observer for `sim.link.FairNetwork` that draws each flow on all links of its path, named by its tag.

    A slice ends when the last byte has left, or when the flow was cancelled; its bytes are those that left.
    """

    def draw(flow: Flow) -> None:
        name = "transfer" if flow.tag is None else str(flow.tag)
        end = flow.since if flow.sent_s is None else flow.sent_s
        for link in flow.path:
            trace.transfer(group, link, name, flow.start, end, bytes=flow.bytes - flow.left)

    return draw
