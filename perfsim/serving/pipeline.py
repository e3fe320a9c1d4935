"""An engine of several pipeline stages: up to `depth` batches of disjoint requests are in flight.

vLLM's loop (`step_with_batch_queue` of vllm/v1/engine/core.py): while the queue of batches is not full, form a batch of
all that has tokens to compute and is not in flight; else, or when there is nothing to form, wait for the oldest batch.
Batches are not balanced: one takes every decode that is back, so decodes tend to gather in one batch.
Every request is looked at in every batch; there are no jumps. Stages are equal parts of the model, so a batch occupies
each for the same time. Neglected: preemption of a request that is in flight (the one that lacks blocks is then left out
of the batch), async scheduling.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from perfsim.cost.step_model import CompiledSteps
from perfsim.ops.step import Span, prefill_sums
from perfsim.serving.config import EngineConfig
from perfsim.serving.front import EngineFront, Hook
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.stepwise import admit_head
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.work import Extras, Work


@dataclass(frozen=True, slots=True)
class Flight:
    """A batch on its way through the stages: its requests with their new tokens, those that get a token out of it.

    It leaves the last stage at `finish`.
    """

    work: Work
    batch: list[tuple[Request, int]]
    emitting: list[Request]
    finish: float


class PipelineEngine(EngineFront):
    """Drives like `Engine`; `steps` prices all stages of a batch together."""

    __slots__ = (
        "depth", "flights", "rank_gpu", "rank_steps", "running", "stage_free",
    )  # fmt: skip

    def __init__(
        self, *, config: EngineConfig, steps: CompiledSteps, recorder: Recorder, windows: tuple[Span, ...], depth: int,
        on_finish: Hook | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config, steps=steps, recorder=recorder, windows=windows, on_finish=on_finish)
        self.rank_steps, self.rank_gpu = steps, steps.on_gpu()
        self.depth = depth
        self.running: list[Request] = []
        self.flights: deque[Flight] = deque()
        self.stage_free = [0.0] * depth

    def advance(self, until: float) -> None:
        """Simulate all that happens before `until`."""
        self.until = until
        while self.now < self.until - TIME_EPS:
            self.complete()
            if self.now >= self.until - TIME_EPS:
                return
            work = self.plan() if len(self.flights) < self.depth else None
            if work is not None:
                self.price(work)
            if self.flights and (work is None or len(self.flights) == self.depth):
                self.now = max(self.now, self.flights[0].finish)
            elif work is None:
                self.now = float("inf")

    def wake(self, at: float) -> None:
        """The loop waits for the oldest batch, whatever happens; only an idle engine begins at once."""
        if self.now == float("inf"):
            self.now = at

    def fail(self, at: float) -> list[Request]:
        """As `Engine.fail`; batches in flight are lost."""
        self.advance(at)
        self.now = at
        for flight in self.flights:  # not recorded: never computed
            for request, tokens in flight.batch:
                request.computed -= tokens
        lost = self.abandon([(request, request.last_token) for request in self.running])
        self.running, self.stage_free = [], [0.0] * self.depth
        self.flights.clear()
        return lost

    def complete(self) -> None:
        """Take in the results of batches that have left the last stage."""
        while self.flights and self.flights[0].finish <= self.now + TIME_EPS:
            flight = self.flights.popleft()
            self._record(flight)
            for request in flight.emitting:
                request.decoding = True
                self._emit(request)

    def plan(self) -> Work | None:
        """The next batch; None when there is nothing to run."""
        self.see(self.now)
        while self.ready and len(self.running) < self.config.max_num_seqs:
            request = self.ready.popleft()
            if request.keys:
                self.kv.commit(request, request.computed // self.config.block_size)
            request.decoding = True
            self.running.append(request)
        preemptions = self.preemptions
        batch = self._form_batch()
        while not batch and self.preemptions > preemptions:  # everyone was preempted: now blocks are free
            preemptions = self.preemptions
            batch = self._form_batch()
        if not batch:
            return None
        decodes = [request for request, _ in batch if request.decoding]
        chunks = [(tokens, request.computed) for request, tokens in batch if not request.decoding]
        new = sum(tokens for tokens, _ in chunks)
        context = tuple(sum(span.attended(request.computed) for request in decodes) for span in self.windows)
        pairs, read = prefill_sums(self.windows, chunks)
        longest = max((request.computed + 1 for request in decodes), default=0)
        for request, tokens in batch:
            request.computed += tokens
        emitting = [request for request, _ in batch if request.computed == request.target]
        work = Work(
            self.now, 1, len(decodes) + new, len(batch), len(decodes), new, context, (0,) * len(context), pairs, read,
            len(self.waiting) + len(self.incoming), len(self.running),
        )  # fmt: skip
        work.gaps, work.emitted, work.kv_blocks = 0, len(emitting), self.kv.total - self.kv.free
        work.longest, work.longest_prompt = longest, max((new + past for new, past in chunks), default=0)
        self.flights.append(Flight(work, batch, emitting, self._enter(work)))
        return work

    def price(self, work: Work) -> None:
        """Times are set as a batch enters the stages."""

    def _enter(self, work: Work) -> float:
        """Send a batch through the stages, each of which takes one batch at a time; when it leaves the last one."""
        steps = self.rank_steps
        gpu = self.rank_gpu.step_seconds(
            work.tokens, work.logits, work.decodes, work.context, work.prefill, work.pairs, work.read,
            longest=(work.longest, work.longest_prompt),
        )  # fmt: skip
        stage = gpu / self.depth
        host, exposed = steps.host_seconds(work.tokens), steps.exposed_seconds(work.logits)
        work.first = steps.behind_host(1, stage, 0.0, host, exposed).first_s
        later = max(stage, host) if steps.async_scheduling else stage  # launches, of which every stage has its own
        work.start = max(self.now, self.stage_free[0])
        at = self.stage_free[0] = work.start + work.first
        for index in range(1, self.depth):
            at = self.stage_free[index] = max(at, self.stage_free[index]) + later
        return at

    def _form_batch(self) -> list[tuple[Request, int]]:
        config, kv, size = self.config, self.kv, self.config.block_size
        budget = config.max_num_batched_tokens
        threshold = config.long_prefill_token_threshold if len(self.running) + len(self.waiting) > 1 else 0
        threshold = threshold or budget
        batch: list[tuple[Request, int]] = []
        preempted = False
        for request in list(self.running):
            if budget <= 0:
                break
            tokens = min(request.target - request.computed, threshold, budget)
            if not tokens or request not in self.running:
                continue  # its token is on its way; or it has just been preempted
            need = -(-(request.computed + tokens) // size) - -(-request.computed // size)
            while kv.free < need and request in self.running and (victim := self._victim()) is not None:
                returned = sum(given for other, given in batch if other is victim)
                batch = [item for item in batch if item[0] is not victim]
                budget += returned
                self._preempt(victim, returned)
                preempted = True
            if kv.free < need or request not in self.running:
                break
            kv.take(need)
            if request.keys and not request.decoding:
                kv.commit(request, (request.computed + tokens) // size)
            batch.append((request, tokens))
            budget -= tokens
        while self.waiting and not preempted and budget > 0 and len(self.running) < config.max_num_seqs:
            if self.waiting.head().remote:
                if not self.set_aside(self.waiting.head()):
                    break
                continue
            chunk = admit_head(self, min(threshold, budget), budget)
            if not chunk:
                break
            batch.append((self.running[-1], chunk))
            budget -= chunk
        return batch

    def _victim(self) -> Request | None:
        """The last (or least urgent) request that is not in a batch in flight."""
        taken = {request for flight in self.flights for request, _ in flight.batch}
        free = [request for request in self.running if request not in taken]
        if not free:
            return None
        if self.config.priority:
            return max(free, key=lambda request: (request.priority, request.queued, request.index))
        return free[-1]

    def _preempt(self, request: Request, returned: int) -> None:
        self.give_back(request, request.computed + returned, resumes=True)
        self.lost_tokens += request.computed
        self.preemptions += 1
        self.running.remove(request)
        request.computed = 0
        request.decoding = False
        request.preemptions += 1
        self.waiting.push_preempted(request)

    def _emit(self, request: Request) -> None:
        if request.emitted == 0:
            request.first_token = self.now
        else:
            self.recorder.gap(self.now - request.last_token)
        request.last_token = self.now
        request.emitted += 1
        if request.emitted < request.output and not self.config.prefill_only:
            return
        self.running.remove(request)
        if request.emitted == request.output:
            self.give_back(request, request.computed)
            self.finish(request)
        else:
            self.hand_over(request)

    def _record(self, flight: Flight) -> None:
        """A segment: `first_s` is the time in the first stage, `held_s` that until the next batch or the end."""
        work = flight.work
        until = min(flight.finish, self.flights[0].work.start) if self.flights else flight.finish
        work.extras = Extras(0, 0, 0, 0.0, until - work.start)
        self.recorder.segment(work)
        self.scheduled_tokens += work.tokens
