"""Feeds an engine with the stages of a load test, each when everything before it has been answered."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import accumulate

from perfsim.serving.driver import Drivable, Progress, requests_of
from perfsim.serving.request import Request
from perfsim.spec.arrivals import StagedArrivals
from perfsim.traffic import RequestChunk

_PROGRESS_EVERY = 4096


class Staged:
    """Sends the requests of `chunks`, whose times leave no room between stages; later stages are moved back.

    A stage begins `process.pause` seconds after the client got the last answer to the one before, or when that one
    ended, whichever is later.
    """

    def __init__(
        self, process: StagedArrivals, chunks: Iterable[RequestChunk], *, ingress: float, egress: float, block_size: int
    ) -> None:  # fmt: skip
        ends = accumulate(seconds for _, seconds in process.stages)
        self._begins = dict(zip(accumulate(process.counts), ends, strict=True))  # by the index of the first request
        self._pause = process.pause
        self._chunks = chunks
        self._ingress, self._egress, self._block_size = ingress, egress, block_size
        self._answered = 0.0

    def on_finish(self, request: Request, at: float) -> None:
        """The engine's hook: an answer reaches the client."""
        self._answered = max(self._answered, at + self._egress)

    def run(self, engine: Drivable, *, progress: Progress | None = None) -> int:
        """Serve all requests; returns how many there were."""
        sent, shift = 0, 0.0
        for chunk in self._chunks:
            for request in requests_of(chunk, first_index=sent, ingress=self._ingress, block_size=self._block_size):
                begin = self._begins.get(request.index)
                if begin is not None:
                    engine.advance(float("inf"))
                    shift = max(shift, self._answered + self._pause - begin)
                request.arrival += shift
                request.queued += shift
                engine.advance(request.queued)
                engine.submit(request)
                if progress is not None and request.index % _PROGRESS_EVERY == 0:
                    progress(request.index, request.arrival)
            sent += len(chunk)
        engine.drain()
        return sent
