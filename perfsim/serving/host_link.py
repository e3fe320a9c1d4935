"""One direction of the link to the host: transfers of K/V, one after the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS

Range = tuple[int, int, int]  # key, first chunk, the chunk behind the last; counted from the start of the prompt


class Transfer:
    """Chunks on their way; `end` is set when the transfer has its place in the line."""

    __slots__ = ("blocks", "end", "ranges", "request")

    def __init__(self, request: Request, ranges: list[Range], blocks: int) -> None:
        self.request = request
        self.ranges = ranges
        self.blocks = blocks
        self.end = float("inf")


class Line:
    """One direction of the host link: `blocks`, `count` and busy `seconds` so far, `latency` from submission to end."""

    __slots__ = ("blocks", "count", "free_at", "latency", "seconds", "under_way")

    def __init__(self) -> None:
        self.under_way: deque[Transfer] = deque()
        self.free_at = float("-inf")
        self.count = self.blocks = 0
        self.seconds = self.latency = 0.0

    def submit(self, transfer: Transfer, at: float, seconds: float) -> float:
        """Queue a transfer at a time in seconds; when it starts."""
        start = max(at, self.free_at)
        self.free_at = transfer.end = start + seconds
        self.under_way.append(transfer)
        self.count += 1
        self.blocks += transfer.blocks
        self.seconds += seconds
        self.latency += transfer.end - at
        return start

    def ended(self, cutoff: float) -> Iterator[Transfer]:
        """Transfers that have ended up to `cutoff`, taken out."""
        while self.under_way and self.under_way[0].end <= cutoff + TIME_EPS:
            yield self.under_way.popleft()

    def next_end(self) -> float:
        """When the oldest transfer ends; inf without any."""
        return self.under_way[0].end if self.under_way else float("inf")
