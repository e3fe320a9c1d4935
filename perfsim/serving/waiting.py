"""The queue in front of an engine: first come, first served, or by priority."""

from __future__ import annotations

from collections import deque
from heapq import heapify, heappop, heappush

from perfsim.serving.request import Request


class FcfsQueue(deque[Request]):
    """Arrival order; a preempted request goes back to the front."""

    def head(self) -> Request:
        return self[0]

    def drop(self, request: Request) -> None:
        """Take out a request that will not be served."""
        self.remove(request)

    take = deque.popleft
    push = deque.append
    push_preempted = deque.appendleft


class PriorityQueue(list[tuple[int, float, int, Request]]):
    """Smallest (priority, arrival) first; a preempted request takes its own place again."""

    def head(self) -> Request:
        return self[0][3]

    def take(self) -> Request:
        return heappop(self)[3]

    def drop(self, request: Request) -> None:
        """Take out a request that will not be served."""
        self.remove((request.priority, request.queued, request.index, request))
        heapify(self)

    def push(self, request: Request) -> None:
        heappush(self, (request.priority, request.queued, request.index, request))

    push_preempted = push


WaitingQueue = FcfsQueue | PriorityQueue
