"""A recorded script sent through perfsim's engines, with every scheduling decision written down.

All steps last one second, so that step k begins at second k and an arrival "before step k" has a time: k, or with async
scheduling, where the batch of step k is formed when step k - 1 begins, k - 1. Every full block of a prompt is one cache
key of its own, as in vLLM. The engines are subclassed to look at them, not to change them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perfsim.cost.step_model import PlainRun
from perfsim.serving.config import EngineConfig
from perfsim.serving.engine import Engine
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.stepwise import StepwiseEngine
from perfsim.serving.work import Work


@dataclass(slots=True)
class Decision:
    """One call of the scheduler: new tokens and cache hits by request, who lost its blocks, free blocks afterwards."""

    tokens: dict[int, int]
    admitted: dict[int, int] = field(default_factory=dict)
    preempted: list[int] = field(default_factory=list)
    free: int = -1

    def same(self, other: Decision) -> bool:
        """Equal requests and tokens, admissions in the same order with the same hits, the same preemptions."""
        return self.tokens == other.tokens and self.preempted == other.preempted and self.admissions == other.admissions

    @property
    def admissions(self) -> list[tuple[int, int]]:
        """Admitted requests in order, each with the tokens found in the cache."""
        return list(self.admitted.items())

    def __str__(self) -> str:
        text = f"tokens {self.tokens}"
        text += f", admitted with hits {self.admitted}" if self.admitted else ""
        return text + (f", preempted {self.preempted}" if self.preempted else "")


class OneSecondSteps:
    """A step model in which every step lasts a second, and a run of decodes has no breakpoint."""

    def step_seconds(self, *args: Any) -> float:
        return 1.0

    def plain_run(
        self, decodes: int, context: tuple[int, ...], growth: tuple[int, ...], limit: int, *rest: Any
    ) -> PlainRun:
        return limit, 1.0, 0.0


class WatchedStepwise(StepwiseEngine):
    """`StepwiseEngine` that keeps its decisions."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decisions: list[Decision] = []
        self._preempted: list[int] = []

    def _form_batch(self) -> list[tuple[Request, int]]:
        self._preempted = []
        before = set(map(id, self.running))
        batch = super()._form_batch()
        decision = Decision({request.index: tokens for request, tokens in batch}, free=self.kv.free)
        decision.admitted = {request.index: request.computed for request, _ in batch if id(request) not in before}
        decision.preempted = self._preempted
        if batch or decision.preempted:
            self.decisions.append(decision)
        return batch

    def _preempt(self, request: Request, taken: int) -> None:
        self._preempted.append(request.index)
        super()._preempt(request, taken)


class WatchedEngine(Engine):
    """`Engine` that keeps its decisions; a jump over n steps gives n of them."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.decisions: list[Decision] = []
        self._current = Decision({})
        self._freed = 0  # blocks given back since the batch was formed
        self._before: set[Request] = set()  # running before it was formed

    def _schedule(self) -> Work | None:
        self._current, self._freed = Decision({}), 0
        self._before = set(self.running)
        work = super()._schedule()
        if work is None and self._current.preempted:
            self._current.free = self.kv.free
            self.decisions.append(self._current)
        return work

    def _mixed_work(self, chunks: list[tuple[Request, int]]) -> Work:
        current = self._current
        current.tokens = {request.index: tokens for request, tokens in chunks}
        current.admitted = {request.index: request.computed for request, _ in chunks if request not in self._before}
        return super()._mixed_work(chunks)

    def _give_back(self) -> None:
        free = self.kv.free
        super()._give_back()
        self._freed += self.kv.free - free

    def preempt(self, request: Request, tokens: int, unhashed: int) -> None:
        self._current.preempted.append(request.index)
        super().preempt(request, tokens, unhashed)

    def _close(self, work: Work) -> None:
        current, free, batch = self._current, self.kv.free, self.batch
        current.tokens |= {request.index: 1 for request in self.running if request.decoding}
        for step in range(work.count):
            self.decisions.append(Decision(current.tokens) if step else current)
            taken = batch.blocks_in_run(step + 1) if step else self._freed
            self.decisions[-1].free = free - taken
        super()._close(work)


ENGINES: dict[str, type[WatchedStepwise | WatchedEngine]] = {"stepwise": WatchedStepwise, "fast": WatchedEngine}


def recorded(log: dict[str, Any]) -> list[Decision]:
    """vLLM's decisions of a log."""
    return [
        Decision(dict(map(tuple, tokens)), dict(map(tuple, admitted)), preempted, free)
        for tokens, admitted, preempted, free in log["decisions"]
    ]


def replayed(log: dict[str, Any], *, engine: str) -> list[Decision]:
    """The decisions of a perfsim engine, "stepwise" or "fast", for the requests of a log."""
    config = EngineConfig(**log["config"])
    watched = ENGINES[engine](config=config, steps=OneSecondSteps(), recorder=Recorder((), windows=1))
    lag = 1 if config.async_scheduling else 0
    for index, (step, prompt, output, priority, blocks) in enumerate(log["requests"]):
        at = float(max(step - lag, 0))
        request = Request(index, at, at, prompt, output, priority, blocks, range(1, len(blocks) + 1))
        # With async scheduling the engine may have formed the batch of second `at` at `at` itself, after waiting.
        watched.advance(at + 0.5 if lag and step else at)
        watched.submit(request)
    watched.drain()
    return watched.decisions
