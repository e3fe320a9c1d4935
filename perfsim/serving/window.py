"""Attended context under a sliding window, kept as a sum that knows when each sequence stops growing."""

from __future__ import annotations

from heapq import heappop, heappush

from perfsim.serving.request import Request


class WindowSum:
    """Sum of min(context, window) over the decoding sequences; it grows by `growth` per step until a window fills."""

    __slots__ = ("_stops", "attended", "growth", "window")

    def __init__(self, window: int) -> None:
        self.window = window
        self.attended = 0
        self.growth = 0
        self._stops: list[tuple[int, int, int, Request]] = []  # (first step with a full window, admission, stint, ..)

    def join(self, request: Request, step: int) -> None:
        """A sequence decodes from `step` on."""
        attends = request.base + step + 1
        self.attended += min(attends, self.window)
        if attends < self.window:
            self.growth += 1
            heappush(self._stops, (self.window - 1 - request.base, request.order, request.stint, request))

    def leave(self, request: Request, step: int) -> None:
        """A sequence does not decode at `step` any more."""
        attends = request.base + step + 1
        self.attended -= min(attends, self.window)
        if attends < self.window:
            self.growth -= 1

    def limit(self, step: int) -> int:
        """Steps from `step` on during which the growth stays as it is."""
        stops = self._stops
        while stops:
            full, _, stint, request = stops[0]
            if request.decoding and request.stint == stint:
                return full - step
            heappop(stops)
        return 1 << 62

    def advance(self, steps: int, step: int) -> None:
        """`steps` steps have run and `step` is the next one; no window filled before the last of them."""
        self.attended += steps * self.growth
        while self._stops and self._stops[0][0] <= step:
            _, _, stint, request = heappop(self._stops)
            if request.decoding and request.stint == stint:
                self.growth -= 1
