"""Clients that go away: after a time the engine drops their requests, wherever they are."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.work import Work

if TYPE_CHECKING:
    from perfsim.serving.front import EngineFront

GAVE_UP = "the client gave up at its timeout"


class Deadlines:
    """When the clients of one engine give up: `timeout` seconds after sending.

    As in vLLM, which aborts a request when its HTTP connection is closed: what it held is free again and stays in the
    prefix cache. Neglected: the way of the news to the scheduler, and that K/V on their way from a KV tier could be
    given up before they are there.
    """

    def __init__(self, engine: EngineFront, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self.heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request) -> None:
        """A request has been sent."""
        if self._timeout == float("inf"):
            return
        heappush(self.heap, (request.arrival + self._timeout, request.index, request))
        engine = self._engine
        if engine.work is not None and engine.work.count > 1:
            self.stop(engine.work)
            engine.now = engine.work.end()

    def stop(self, work: Work) -> None:
        """Cut the steps in flight short where the next client gives up."""
        heap = self.heap
        while heap and heap[0][2].finish >= 0.0:
            heappop(heap)
        if heap and work.count > 1:
            work.cut(heap[0][0], ahead=1 if self._engine.config.async_scheduling else 0)

    def expire(self, cutoff: float) -> bool:
        """Drop the requests whose clients had gone by `cutoff`; whether there were any."""
        heap, seen = self.heap, False
        later = []
        while heap and heap[0][0] <= cutoff + TIME_EPS:
            at, index, request = heappop(heap)
            if request.finish >= 0.0:
                continue
            if self._drop(request, at, cutoff):
                seen = True
            else:
                later.append((at, index, request))
        for entry in later:
            heappush(heap, entry)
        return seen

    def _drop(self, request: Request, at: float, cutoff: float) -> bool:
        engine, offload = self._engine, self._engine.offload
        if request in engine.running:
            last_token = engine.leave(request)
            if offload is not None:
                offload.forget(request)
            engine.let_go(request)
        elif request.queued > cutoff + TIME_EPS or (offload is not None and offload.holds(request)):
            return False
        else:
            last_token = request.last_token
            engine.waiting.drop(request)
            if offload is not None:
                offload.forget(request)
        engine.forget(request, last_token, again=False)
        engine.recorder.reject(GAVE_UP)
        if engine.on_finish is not None:
            engine.on_finish(request, at)
        return True
