"""One continuous-batching engine with vLLM V1's scheduling semantics, simulated from state change to state change.

The engine keeps the few sums over the batch that a step's cost depends on. While the batch stays the same it jumps over
all steps up to the next completion, arrival, exhausted block pool or breakpoint of the cost model in closed form; a
step with prefill work, an admission or a preemption is simulated on its own. Time is a sequence of step boundaries.

Under async scheduling the batch of a step is formed when the step before it starts: an arrival or a freed block is seen
one step later than under synchronous scheduling. When that batch would be empty the engine waits for the running step
and schedules again with everything in sight, as vLLM does. Neglected there: preemption of a request whose last token is
still in flight.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from perfsim.cost.step_model import StepModel
from perfsim.ops.step import attended_pairs, context_read
from perfsim.serving.batch import DecodeBatch
from perfsim.serving.kv_cache import KVCache
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.running import schedule_in_order, schedule_together
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.waiting import FcfsQueue, PriorityQueue, WaitingQueue
from perfsim.serving.work import Work

_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Scheduler limits, every default filled in; token and block counts."""

    max_num_batched_tokens: int
    max_num_seqs: int
    max_model_len: int
    block_size: int
    total_blocks: int
    window_blocks: int = 0
    priority: bool = False
    chunked_prefill: bool = True
    prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    async_scheduling: bool = True
    reserve_full_isl: bool = True
    watermark_blocks: int = 0


class Engine:
    """A replica: `submit` requests in time order, `advance` to a time, `drain` at the end."""

    def __init__(
        self, *, config: EngineConfig, steps: StepModel, recorder: Recorder, windows: tuple[int | None, ...] = (None,),
        on_finish: Callable[[Request, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.steps = steps
        self.recorder = recorder
        self.on_finish = on_finish
        self.windows = windows
        self.kv = KVCache(config.total_blocks, block_size=config.block_size, caching=config.prefix_caching)
        self._zeros = (0,) * len(windows)
        self.waiting: WaitingQueue = PriorityQueue() if config.priority else FcfsQueue()
        self.incoming: deque[Request] = deque()  # submitted, not yet seen by the scheduler
        self.running: dict[Request, None] = {}  # admission order
        self.prefilling: list[Request] = []
        self.emitting: list[Request] = []  # their prefill ends with the step in flight
        self.stalled: list[Request] = []  # decodes that get no token from the step in flight
        self.rejoining: list[Request] = []
        self.late: list[Request] = []  # decodes that got none from the step before
        self.ended: list[Request] = []  # finished, blocks and slot not yet given back
        self.now = float("inf")  # the next step boundary
        self.until = float("-inf")  # how far advance() may go; a hook may lower it
        self.last_start = float("-inf")  # when the step in flight began
        self.in_flight = False
        self.work: Work | None = None  # the steps in flight; more than one can still be cut short
        self.batch = DecodeBatch(block_size=config.block_size, windows=windows)
        self.blocked = False  # the head of the queue cannot be admitted before something is freed
        self.submitted = self.admissions = self.preemptions = 0
        self.scheduled_tokens = 0
        self.saved_tokens = 0  # found in the prefix cache
        self.lost_tokens = 0  # dropped by preemptions
        self.population = 0  # requests in the engine, and its integral over time
        self.request_seconds = 0.0
        self._counted_at = 0.0

    # --- what a cluster calls ---------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """A request reaches the engine's queue at `request.queued`; never before what `advance` has passed."""
        self.submitted += 1
        config = self.config
        length = request.prompt + request.output
        reason = ""
        if length > config.max_model_len:
            reason = "longer than max_model_len"
        elif -(-(length - 1) // config.block_size) + config.window_blocks > config.total_blocks:
            reason = "longer than the KV pool"
        elif not config.chunked_prefill and length > config.max_num_batched_tokens:
            reason = "longer than max_num_batched_tokens without chunked prefill"
        if reason:
            self.recorder.reject(reason)
            if self.on_finish is not None:
                self.on_finish(request, request.queued)
            return
        self.request_seconds += self.population * (request.queued - self._counted_at)
        self._counted_at = request.queued
        self.population += 1
        self.incoming.append(request)
        self._wake(request.queued)

    def next_event(self) -> float:
        """When something may happen that others can see: the end of the steps in flight; inf when there are none."""
        return self.now

    def advance(self, until: float) -> None:
        """Simulate every boundary before `until`; what is in flight then ends later, but can be cut short by events."""
        self.until = until
        while self.now < self.until - TIME_EPS:
            self.complete()
            if self.now >= self.until - TIME_EPS:
                return  # a finish hook announced an arrival at this very boundary
            work = self.plan()
            if work is None:
                self.now = float("inf")
                return
            if work.prefill:
                work.first = self.steps.step_seconds(
                    work.tokens, work.logits, self.batch.size, work.context, work.prefill, work.pairs, work.read
                )
            else:
                run = self.steps.decode_run(work.tokens, work.context, work.growth, work.count)
                work.count, work.first, work.slope = run
            self.now = work.end()

    def drain(self) -> None:
        """Run until nothing is left to do."""
        self.advance(float("inf"))
        if self.waiting or self.running or self.incoming:
            raise RuntimeError("the engine stopped with work left: a scheduling bug")

    def _wake(self, at: float) -> None:
        """Something happens at `at` that the scheduler must see at the next boundary."""
        work = self.work
        if work is not None:
            if work.count > 1:  # under async scheduling the batch of the step after this one is formed already
                work.cut(at, ahead=1 if self.config.async_scheduling else 0)
                self.now = work.end()
        elif self.now == float("inf"):
            self.now = at

    # --- one boundary -----------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Apply what the steps that end now have produced."""
        if self.work is not None:
            self._close(self.work)
        now, batch = self.now, self.batch
        if self.late or self.stalled:
            for request in self.late:
                self.recorder.gap(now - request.last_token)
            self.late, self.stalled = self.stalled, []
        while (completed := batch.pop_completed()) is not None:
            batch.leave(completed)
            self._finish(completed)
        if not self.emitting:
            return
        for request in self.emitting:
            if request.emitted == 0:
                request.first_token = now
            else:
                self.recorder.gap(now - request.last_token)
            request.emitted += 1
            if request.emitted == request.output:
                self._finish(request)
            else:
                batch.join(request)
        self.emitting = []

    def plan(self) -> Work | None:
        """Choose the next step, or run of equal steps, still without times; None when there is nothing to run."""
        lagging = self.in_flight and self.config.async_scheduling
        if self.incoming:
            self._see_arrivals(self.last_start if lagging else self.now)
        if self.ended and not lagging:
            self._give_back()
        preemptions = self.preemptions
        self.work = self._schedule()
        if self.work is not None:
            return self.work
        self.in_flight = False
        if lagging:
            self._see_arrivals(self.now)
            self._give_back()
        elif self.preemptions == preemptions:
            return None
        self.work = self._schedule()
        while self.work is None and self.preemptions > preemptions:  # everyone was preempted: now blocks are free
            preemptions = self.preemptions
            self.work = self._schedule()
        return self.work

    def _see_arrivals(self, cutoff: float) -> None:
        incoming = self.incoming
        while incoming and incoming[0].queued <= cutoff + TIME_EPS:
            request = incoming.popleft()
            if self.config.priority or not self.waiting:
                self.blocked = False
            self.waiting.push(request)

    def _give_back(self) -> None:
        """Free the blocks and slots of requests that ended."""
        if self.ended:
            if len(self.ended) > 1:
                self.ended.sort(key=_admission)  # vLLM goes through the running requests in order
            running = self.running
            for request in self.ended:
                self._free(request, request.prompt + request.output - 1, resumes=False)
                del running[request]
            self.ended.clear()
            self.blocked = False

    def _schedule(self) -> Work | None:
        """Form a batch as vLLM does: running requests first, then admissions while blocks, slots and budget last."""
        batch, kv = self.batch, self.kv
        if batch.size and not self.prefilling and (self.blocked or not self.waiting):
            need = batch.block_phase[batch.step % batch.block_size]
            if need <= kv.free:
                return self._decode_work(need, limit=1 if self.late else _NO_LIMIT)
        chunks = schedule_together(self)
        stalled: list[Request] = []
        preempted = False
        if chunks is None:
            chunks, stalled, preempted = schedule_in_order(self)
        budget = self.config.max_num_batched_tokens - self.batch.size - sum(tokens for _, tokens in chunks)
        if self.waiting and not preempted and budget > 0 and (chunks or not self.blocked):
            self._admit(budget, chunks)
        self.stalled, self.rejoining = stalled, list(stalled)
        if chunks:
            return self._mixed_work(chunks)
        if self.batch.size:
            again = stalled or preempted or self.late or (self.waiting and not self.blocked)
            return self._decode_work(0, limit=1 if again else _NO_LIMIT)
        self._rejoin()
        return None

    def _admit(self, budget: int, chunks: list[tuple[Request, int]]) -> None:
        config, kv, waiting, running = self.config, self.kv, self.waiting, self.running
        size = config.block_size
        while waiting and budget > 0:
            if len(running) >= config.max_num_seqs:
                self.blocked = True
                return
            request = waiting.head()
            target = request.prompt + request.emitted
            hits, idle = kv.lookup(request, (target - 1) // size) if request.keys or request.run else (0, 0)
            cached = hits * size
            chunk = target - cached
            if config.long_prefill_token_threshold and len(running) + len(waiting) > 1:
                chunk = min(chunk, config.long_prefill_token_threshold)
            if chunk > budget:
                if not config.chunked_prefill:
                    return
                chunk = budget
            new = -(-(cached + chunk) // size) - hits + config.window_blocks
            must_fit = -(-target // size) - hits + config.window_blocks if config.reserve_full_isl else new
            if must_fit + idle + (config.watermark_blocks if running else 0) > kv.free:
                # Evicting what it would have hit may make a first chunk fit; a whole prompt waits for freed blocks.
                self.blocked = config.reserve_full_isl or not (request.keys or request.run)
                return
            waiting.take()
            if hits:
                kv.acquire(request, hits)
                self.saved_tokens += cached
            else:
                request.run = None
            kv.take(new)
            request.computed = cached
            if request.scheduled < 0.0:
                request.scheduled = max(self.now, request.queued)
                request.cached = cached
            self.admissions += 1
            request.order = self.admissions
            running[request] = None
            self.prefilling.append(request)
            chunks.append((request, chunk))
            budget -= chunk
            if request.keys:
                kv.commit(request, (cached + chunk) // size)

    # --- executing --------------------------------------------------------------------------------------------------

    def _mixed_work(self, chunks: list[tuple[Request, int]]) -> Work:
        """One step with prefill work; decodes take part in it."""
        decodes = self.batch.size
        context, growth = self.batch.attended()
        new = 0
        emitting = self.emitting
        for request, chunk in chunks:
            new += chunk
            request.computed += chunk
            if request.computed == request.prompt + request.emitted:
                emitting.append(request)
        if len(emitting) == len(self.prefilling):
            self.prefilling = []
        elif emitting:
            self.prefilling = [request for request in self.prefilling if request not in emitting]
        pairs, read = self._attention_work(chunks)
        self._give_back()
        self.blocked = False
        waiting = len(self.waiting) + len(self.incoming)
        return Work(
            self.now, 1, decodes + new, decodes + len(chunks), new, context, growth, pairs, read, waiting
        )  # fmt: skip

    def _attention_work(self, chunks: list[tuple[Request, int]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(causal pairs, K/V entries read) of prefill chunks that are computed already, per window."""
        if len(chunks) == 1 and len(self.windows) == 1:
            request, chunk = chunks[0]
            end = request.computed
            return (chunk * (end - chunk) + chunk * (chunk + 1) // 2,), (end,)
        work = [(chunk, request.computed - chunk) for request, chunk in chunks]
        pairs = [sum(attended_pairs(chunk, past, window) for chunk, past in work) for window in self.windows]
        read = [sum(context_read(chunk, past, window) for chunk, past in work) for window in self.windows]
        return tuple(pairs), tuple(read)

    def _decode_work(self, need: int, *, limit: int) -> Work:
        """As many equal decode steps, at most `limit`, as nothing can change in; the first one takes `need` blocks."""
        batch, kv = self.batch, self.kv
        if self.incoming or (self.ended and self.waiting):
            limit = 1  # what arrived or was freed during the step in flight counts from the next one on
        if need:
            kv.take(need)
        if self.ended:
            self._give_back()
        if limit > 1:
            limit = min(limit, batch.steps_left())
            if kv.free < batch.size * (limit // batch.block_size + 1):
                limit = batch.steps_with_blocks(kv.free, limit)
        context, growth = batch.attended()
        waiting, size = len(self.waiting) + len(self.incoming), batch.size
        return Work(self.now, limit, size, size, 0, context, growth, self._zeros, self._zeros, waiting)

    def _close(self, work: Work) -> None:
        """The steps in flight have been executed: write the segment down and move the sums to its end."""
        batch = self.batch
        decodes, count = batch.size, work.count
        if count > 1:
            self.kv.take(batch.blocks_in_run(count))
        self.recorder.segment((
            work.start, count, work.first, work.slope, work.tokens, work.logits, decodes, decodes - len(self.late),
            decodes + len(self.emitting), work.prefill, len(self.running), work.waiting, self.kv.total - self.kv.free,
            *work.context, *work.growth, *work.pairs, *work.read,
        ))  # fmt: skip
        self.scheduled_tokens += count * work.tokens
        self.last_start = work.last_start()
        self.in_flight = True
        self.work = None
        batch.advance(count)
        if self.rejoining:
            self._rejoin()

    def _rejoin(self) -> None:
        """Decodes that got no token from a step take part in the next one again."""
        for request in self.rejoining:
            self.batch.join(request)
        self.rejoining = []

    # --- membership -------------------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        now = request.finish = self.now
        self.request_seconds += self.population * (now - self._counted_at)
        self._counted_at = now
        self.population -= 1
        self.recorder.finish(request)
        self.ended.append(request)
        if self.on_finish is not None:
            self.on_finish(request, self.now)

    def _free(self, request: Request, tokens: int, *, resumes: bool) -> None:
        self.kv.release(request, tokens, resumes=resumes)
        if self.config.window_blocks:
            self.kv.put_back_blank(self.config.window_blocks)

    def stall(self, request: Request) -> None:
        """A decode that gets no token in this step: off the sums until the step is over."""
        if request in self.late:
            self.late.remove(request)
        else:
            request.last_token = self.now
        self.batch.leave(request)

    def preempt(self, request: Request, tokens: int) -> None:
        """Drop a running request's blocks (it has slots for `tokens` tokens) and queue it again: recompute later."""
        if request.decoding:
            self.stall(request)
        else:
            self.prefilling.remove(request)
        self.lost_tokens += request.computed
        self._free(request, tokens, resumes=True)
        request.computed = 0
        request.preemptions += 1
        self.preemptions += 1
        del self.running[request]
        self.waiting.push_preempted(request)
        self.blocked = False


def _admission(request: Request) -> int:
    return request.order
