"""Attended context under a bounded span, kept as a sum that knows when each sequence stops growing or starts anew."""

from __future__ import annotations

from heapq import heappop, heappush

from perfsim.ops.step import Span
from perfsim.serving.request import Request

Breaks = list[tuple[int, int, int, Request]]  # (step at which the growth of a sequence changes, admission, stint, ..)


class WindowSum:
    """Sum of min(context, size) over the decoding sequences; it grows by `growth` per step until a window fills.

    A `top_k` span attends as many tokens as a window of the same size.
    """

    __slots__ = ("_breaks", "attended", "growth", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.attended = 0
        self.growth = 0
        self._breaks: Breaks = []

    def join(self, request: Request, step: int) -> None:
        """A sequence decodes from `step` on."""
        attends = request.base + step + 1
        self.attended += min(attends, self.size)
        if attends < self.size:
            self.growth += 1
            heappush(self._breaks, (self.size - 1 - request.base, request.order, request.stint, request))

    def leave(self, request: Request, step: int) -> None:
        """A sequence does not decode at `step` any more."""
        attends = request.base + step + 1
        self.attended -= min(attends, self.size)
        if attends < self.size:
            self.growth -= 1

    def limit(self, step: int) -> int:
        """Steps from `step` on during which the growth stays as it is."""
        return _first_break(self._breaks) - step

    def advance(self, steps: int, step: int) -> None:
        """`steps` steps have run and `step` is the next one; no window filled before the last of them."""
        self.attended += steps * self.growth
        while self._breaks and self._breaks[0][0] <= step:
            _, _, stint, request = heappop(self._breaks)
            if request.decoding and request.stint == stint:
                self.growth -= 1


class ChunkSum:
    """Sum of position mod size + 1 over the decoding sequences: each adds one per step and starts anew with a chunk."""

    __slots__ = ("_breaks", "attended", "growth", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.attended = 0
        self.growth = 0
        self._breaks: Breaks = []

    def join(self, request: Request, step: int) -> None:
        """A sequence decodes from `step` on."""
        within = (request.base + step) % self.size
        self.attended += within + 1
        self.growth += 1
        heappush(self._breaks, (step + self.size - within, request.order, request.stint, request))

    def leave(self, request: Request, step: int) -> None:
        """A sequence does not decode at `step` any more."""
        self.attended -= (request.base + step) % self.size + 1
        self.growth -= 1

    def limit(self, step: int) -> int:
        """Steps from `step` on before some sequence begins a chunk."""
        return _first_break(self._breaks) - step

    def advance(self, steps: int, step: int) -> None:
        """`steps` steps have run and `step` is the next one; no chunk began before it."""
        self.attended += steps * self.growth
        while self._breaks and self._breaks[0][0] <= step:
            at, order, stint, request = heappop(self._breaks)
            if request.decoding and request.stint == stint:
                self.attended -= self.size
                heappush(self._breaks, (at + self.size, order, stint, request))


SpanSum = WindowSum | ChunkSum


def span_sum(span: Span) -> SpanSum:
    """The sum that follows a bounded span; the unlimited one needs none, it is the context itself."""
    return ChunkSum(span.size) if span.kind == "chunk" else WindowSum(span.size)


def _first_break(breaks: Breaks) -> int:
    """The first step at which a sequence that still decodes changes its growth; entries of others are dropped."""
    while breaks:
        at, _, stint, request = breaks[0]
        if request.decoding and request.stint == stint:
            return at
        heappop(breaks)
    return 1 << 62
