"""One replica as its cluster sees it: an engine, its place in the life cycle, and what it was used for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perfsim.serving.replica import GroupPlan

STARTING, SERVING, DRAINING, FAILED, OFF = "starting", "serving", "draining", "failed", "off"


class Replica:
    """`index` orders replicas and names the bits of routers; `load` counts the requests that are in it.

    `engine` may be behind the cluster's clock: what happens before `next_at` is not visible outside. `powered` holds
    (on, off) times in seconds, off is None while it is on.
    """

    __slots__ = (
        "block_size", "dispatched", "engine", "failures", "index", "load", "name", "next_at", "number", "plan",
        "powered", "serving", "state",
    )  # fmt: skip

    def __init__(self, index: int, name: str, number: int, plan: GroupPlan) -> None:
        self.index = index
        self.name = name
        self.number = number  # of its group in the deployment
        self.plan = plan
        self.block_size = plan.plan.config.block_size
        self.engine: Any = None
        self.load = 0
        self.next_at = float("inf")
        self.dispatched = 0
        self.failures = 0
        self.powered: list[tuple[float, float | None]] = []
        self.state = OFF
        self.serving = False

    @property
    def schedulers(self) -> tuple[Any, ...]:
        """The engines that schedule on their own: one, or one per data-parallel rank of a lock-step group."""
        return tuple(getattr(self.engine, "ranks", (self.engine,)))

    def enter(self, state: str, at: float) -> None:
        """Change the state at a time in seconds; a failed or starting replica is paid for as well."""
        if (self.state == OFF) != (state == OFF):
            if state == OFF:
                on, _ = self.powered.pop()
                self.powered.append((on, at))
            else:
                self.powered.append((at, None))
        self.state = state
        self.serving = state == SERVING

    def powered_seconds(self, start: float, end: float) -> float:
        """Seconds between `start` and `end` during which it was on."""
        spans = [(max(on, start), min(end if off is None else off, end)) for on, off in self.powered]
        return sum(max(0.0, off - on) for on, off in spans)
