"""Data-parallel attention ranks that share experts: schedulers and KV pools of their own, one clock for all.

Every forward pass meets in the exchange of the experts, so a step lasts as long as the slowest rank's own part, then
the experts of everybody's tokens. A rank without work runs along with a dummy batch of one token, as vLLM's ranks do.
Neglected: padding of all ranks to the largest batch (CUDA graphs), the up to 15 dummy steps after the last request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perfsim.cost.step_model import CompiledSteps, DecodeRun
from perfsim.serving.config import EngineConfig
from perfsim.serving.front import EngineFront, Hook
from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.work import Work

DUMMY_TOKENS = 1  # vllm/v1/worker/gpu_worker.py, execute_dummy_batch


class LockstepGroup:
    """One replica of several ranks; drives like an engine."""

    def __init__(self, ranks: Sequence[EngineFront], *, steps: CompiledSteps, jumps: bool = True) -> None:
        """`ranks` are fresh engines; without `jumps` every step is priced on its own."""
        self.ranks = tuple(ranks)
        self.steps, self._gpu = steps, steps.on_gpu()
        self.now = float("inf")
        self.until = float("-inf")
        self._jumps = jumps
        self._works: list[Work] = []
        self._home: dict[Request, EngineFront] = {}  # the rank of a request whose K/V come or go
        self._next = 0
        self.begin: Callable[[float], None] | None = None  # told when the first request comes, before anything runs
        for rank in self.ranks:
            rank.on_wake = self._wake

    @property
    def config(self) -> EngineConfig:
        """Limits of one rank."""
        return self.ranks[0].config

    @property
    def population(self) -> int:
        """Requests in all ranks."""
        return sum(rank.population for rank in self.ranks)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, here or for others."""
        return all(rank.idle for rank in self.ranks)

    def set_hooks(self, *, finish: Hook | None, handover: Hook | None = None, reserve: Hook | None = None) -> None:
        """The hooks of every rank."""
        for rank in self.ranks:
            rank.on_finish, rank.on_handover, rank.on_reserve = finish, handover, reserve

    def submit(self, request: Request) -> None:
        """To the rank with the fewest requests; equals take turns, as in vLLM's client."""
        if self.begin is not None:
            self.begin(request.queued)
            self.begin = None
        count = len(self.ranks)
        turns = [(self.ranks[(self._next + turn) % count].population, turn) for turn in range(count)]
        rank = self.ranks[(self._next + min(turns)[1]) % count]
        self._next = (self.ranks.index(rank) + 1) % count
        if request.remote or rank.config.prefill_only:
            self._home[request] = rank
        rank.submit(request)

    def notify(self, request: Request, at: float) -> None:
        """As `EngineFront.notify`, to the rank that has the request's blocks."""
        self._home.pop(request).notify(request, at)

    def withdraw(self, request: Request, at: float) -> None:
        """As `EngineFront.withdraw`, from the rank that has the request."""
        self._home.pop(request).withdraw(request, at)

    def next_event(self) -> float:
        """The end of the steps in flight; inf when there are none."""
        return self.now

    def advance(self, until: float) -> None:
        """Simulate every boundary before `until`."""
        self.until = until
        while self.now < self.until - TIME_EPS:
            self._complete()
            if self.now >= self.until - TIME_EPS:
                return
            if not self._plan():
                self.now = min(rank.offload.next_event() if rank.offload else float("inf") for rank in self.ranks)

    def drain(self) -> None:
        """Run until nothing is left to do."""
        self.advance(float("inf"))
        if not self.idle:
            raise RuntimeError("the group stopped with work left: a scheduling bug")

    def fail(self, at: float) -> list[Request]:
        """Lose everything at the end of the step in flight at `at`; see `Engine.fail`."""
        self.advance(at)
        if self._works:
            self._cut(at, ahead=0)
        else:
            self.now = min(self.now, at)
        end = self.now
        lost: list[Request] = []
        for rank in self.ranks:
            rank.now = end
            lost += rank.fail(end)
        self._home.clear()
        self._works, self.now = [], float("inf")
        return lost

    def _wake(self, at: float, running: bool) -> None:
        if self._works:  # only a rank in flight has formed its next batch already
            self._cut(at, ahead=1 if running and self.steps.async_scheduling else 0)
        else:
            self.now = min(self.now, at)

    def _cut(self, at: float, *, ahead: int) -> None:
        for work in self._works:
            if work.count > 1:
                work.cut(at, ahead=ahead)
        self.now = self._works[0].end()

    def _complete(self) -> None:
        self._works = []
        for rank in self.ranks:
            rank.now, rank.until = self.now, self.until
            rank.complete()
            self.until = min(self.until, rank.until)

    def _plan(self) -> bool:
        works = []
        for rank in self.ranks:
            work = rank.plan()
            if work is not None:
                works.append(work)
            elif rank.offload is not None:
                rank.offload.rest()
        if not works:
            return False
        tokens = sum(work.tokens for work in works) + DUMMY_TOKENS * self.steps.queries * (len(self.ranks) - len(works))
        count, first, slope = self._price(works, tokens)
        for work in works:
            work.count, work.first, work.slope, work.group_tokens = count, first, slope, tokens
        for rank in self.ranks:
            if rank.offload is not None:
                count = min(count, rank.offload.steps(works[0], runs=rank.work is not None))
        for work in works:
            work.count = count
        self._works = works
        self.now = works[0].end()
        return True

    def _price(self, works: list[Work], tokens: int) -> DecodeRun:
        """The slowest rank's own part, the experts of all `tokens`, the slowest scheduler."""
        steps, together = self.steps, self.steps.group_s[tokens]
        host = max(steps.host_seconds(work.tokens) for work in works)
        exposed = max(steps.exposed_seconds(work.logits) for work in works)
        if self._jumps and not any(work.tokens > work.decodes for work in works):
            limit = min(work.count for work in works)
            runs = [
                self._gpu.decode_run(work.tokens, work.context, work.growth, limit, longest=work.longest)
                for work in works
            ]
            limit, gpu, slope = slowest(runs)
            return steps.behind_host(limit, gpu + together, slope, host, exposed)
        gpu = max(
            self._gpu.step_seconds(
                work.tokens,
                work.logits,
                work.decodes,
                work.context,
                work.prefill,
                work.pairs,
                work.read,
                longest=(work.longest, work.longest_prompt),
            )
            for work in works
        )
        gpu += together
        return DecodeRun(1, exposed + (max(gpu, host) if steps.async_scheduling else gpu + host), 0.0)


def slowest(runs: Sequence[DecodeRun]) -> DecodeRun:
    """The upper envelope of affine runs for as long as one of them leads.

    >>> slowest([DecodeRun(100, 1.0, 0.0), DecodeRun(90, 0.5, 0.1)])
    DecodeRun(max_steps=6, first_s=1.0, slope_s=0.0)
    """
    _, first, slope = max(runs, key=lambda run: (run.first_s, run.slope_s))
    limit = min(run.max_steps for run in runs)
    for _, other, steeper in runs:
        gap, gain = first - other, steeper - slope
        if gain > 0.0 and gap < gain * limit:
            limit = min(limit, int(gap / gain) + 1)
    return DecodeRun(limit, first, slope)
