"""The same engine without shortcuts: every step is formed, priced and finished sequence by sequence.

It shares the block pool, the queue and the cost of one step with `Engine`, and nothing else: no sums over the batch, no
jumps, no completion heap. It is what the fast engine is tested against, and what `--stepwise` runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from perfsim.cost.step_model import StepModel
from perfsim.ops.step import attended_pairs, context_read
from perfsim.serving.kv_cache import KVCache
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.waiting import FcfsQueue, PriorityQueue, WaitingQueue

if TYPE_CHECKING:
    from perfsim.serving.engine import EngineConfig


class StepwiseEngine:
    """Drop-in for `Engine`: `submit` in time order, `advance`, `drain`."""

    def __init__(
        self, *, config: EngineConfig, steps: StepModel, recorder: Recorder, windows: tuple[int | None, ...] = (None,),
        on_finish: Callable[[Request, float], None] | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.steps = steps
        self.recorder = recorder
        self.windows = windows
        self.on_finish = on_finish
        self.kv = KVCache(config.total_blocks, block_size=config.block_size, caching=config.prefix_caching)
        self.waiting: WaitingQueue = PriorityQueue() if config.priority else FcfsQueue()
        self.incoming: deque[Request] = deque()
        self.running: list[Request] = []
        self.batch: list[tuple[Request, int]] = []  # the step in flight: requests and their new tokens
        self.ended: list[Request] = []
        self.now = float("inf")
        self.until = float("-inf")
        self.last_start = float("-inf")
        self.in_flight = False
        self.preemptions = self.submitted = self.scheduled_tokens = self.saved_tokens = self.lost_tokens = 0
        self.request_seconds = 0.0
        self.population = 0
        self._counted_at = 0.0

    def submit(self, request: Request) -> None:
        """As `Engine.submit`."""
        self.submitted += 1
        config, length = self.config, request.prompt + request.output
        reason = ""
        if length > config.max_model_len:
            reason = "longer than max_model_len"
        elif self._blocks(length - 1) + config.window_blocks > config.total_blocks:
            reason = "longer than the KV pool"
        elif not config.chunked_prefill and length > config.max_num_batched_tokens:
            reason = "longer than max_num_batched_tokens without chunked prefill"
        if reason:
            self.recorder.reject(reason)
            if self.on_finish is not None:
                self.on_finish(request, request.queued)
            return
        self._population(1, request.queued)
        self.incoming.append(request)
        if self.now == float("inf"):
            self.now = request.queued

    def advance(self, until: float) -> None:
        """As `Engine.advance`."""
        self.until = until
        while self.now < self.until - TIME_EPS:
            self._finish_step()
            if self.now >= self.until - TIME_EPS:
                return
            if not self._start_step():
                self.now = float("inf")
                return

    def drain(self) -> None:
        """As `Engine.drain`."""
        self.advance(float("inf"))
        if self.waiting or self.running or self.incoming:
            raise RuntimeError("the engine stopped with work left: a scheduling bug")

    def _finish_step(self) -> None:
        for request, tokens in self.batch:
            request.computed += tokens
        for request, _ in self.batch:
            if request.computed == request.target:
                request.decoding = True
                self._emit(request)
        self.batch = []

    def _emit(self, request: Request) -> None:
        if request.emitted == 0:
            request.first_token = self.now
        else:
            self.recorder.gap(self.now - request.last_token)
        request.last_token = self.now
        request.emitted += 1
        if request.emitted == request.output:
            request.finish = self.now
            self._population(-1, self.now)
            self.recorder.finish(request)
            self.ended.append(request)
            if self.on_finish is not None:
                self.on_finish(request, self.now)

    def _start_step(self) -> bool:
        lagging = self.in_flight and self.config.async_scheduling
        self._see(self.last_start if lagging else self.now)
        if not lagging:
            self._give_back()
        preemptions = self.preemptions
        batch = self._form_batch()
        if not batch and lagging:
            self._see(self.now)
            self._give_back()
            batch = self._form_batch()
        while not batch and self.preemptions > preemptions:
            preemptions = self.preemptions
            batch = self._form_batch()
        if lagging:
            self._give_back()
        self.in_flight = bool(batch)
        if batch:
            self._execute(batch)
        return bool(batch)

    def _population(self, change: int, at: float) -> None:
        self.request_seconds += self.population * (at - self._counted_at)
        self._counted_at = at
        self.population += change

    def _see(self, cutoff: float) -> None:
        while self.incoming and self.incoming[0].queued <= cutoff + TIME_EPS:
            self.waiting.push(self.incoming.popleft())

    def _give_back(self) -> None:
        for request in self.ended:
            self.running.remove(request)
            self._release(request, request.computed, resumes=False)
        self.ended = []

    def _form_batch(self) -> list[tuple[Request, int]]:
        """vLLM's `Scheduler.schedule`, request by request."""
        config, kv = self.config, self.kv
        budget = config.max_num_batched_tokens
        threshold = config.long_prefill_token_threshold if len(self.running) + len(self.waiting) > 1 else 0
        threshold = threshold or budget
        batch: list[tuple[Request, int]] = []
        order = [request for request in self.running if request.emitted < request.output]
        preempted: list[Request] = []
        at = 0
        while at < len(order) and budget > 0:
            request = order[at]
            tokens = min(request.target - request.computed, threshold, budget)
            need = self._blocks(request.computed + tokens) - self._blocks(request.computed)
            while kv.free < need and request not in preempted:
                victim = order[-1]
                if config.priority:
                    victim = max(order, key=lambda other: (other.priority, other.queued, other.index))
                at -= order.index(victim) < at
                order.remove(victim)
                taken = sum(given for other, given in batch if other is victim)
                batch = [item for item in batch if item[0] is not victim]
                budget += taken
                self._preempt(victim, victim.computed + taken)
                preempted.append(victim)
            if request in preempted:
                break
            kv.take(need)
            if request.keys and request.computed < request.prompt:
                kv.commit(request, (request.computed + tokens) // config.block_size)
            batch.append((request, tokens))
            budget -= tokens
            at += 1
        while self.waiting and not preempted and budget > 0 and len(self.running) < config.max_num_seqs:
            chunk = self._admit(min(threshold, budget), budget)
            if not chunk:
                break
            batch.append((self.running[-1], chunk))
            budget -= chunk
        return batch

    def _admit(self, most: int, budget: int) -> int:
        """Admit the head of the queue if its blocks fit; the tokens it may compute now, 0 if it has to wait."""
        config, kv, size = self.config, self.kv, self.config.block_size
        request = self.waiting.head()
        hits, idle = kv.lookup(request, (request.target - 1) // size)
        cached = hits * size
        chunk = request.target - cached
        if not config.chunked_prefill and min(chunk, most if most < budget else chunk) > budget:
            return 0
        chunk = min(chunk, most)
        new = self._blocks(cached + chunk) - hits + config.window_blocks
        full = self._blocks(request.target) - hits + config.window_blocks
        watermark = config.watermark_blocks if self.running else 0
        if (full if config.reserve_full_isl else new) + idle + watermark > kv.free:
            return 0
        self.waiting.take()
        kv.acquire(request, hits)
        kv.take(new)
        self.saved_tokens += cached
        request.computed = cached
        if request.scheduled < 0.0:
            request.scheduled, request.cached = max(self.now, request.queued), cached
        self.running.append(request)
        if request.keys:
            kv.commit(request, (cached + chunk) // size)
        return chunk

    def _preempt(self, request: Request, slots: int) -> None:
        self.lost_tokens += request.computed
        self._release(request, slots, resumes=True)
        request.computed = 0
        request.decoding = False
        request.preemptions += 1
        self.preemptions += 1
        self.running.remove(request)
        self.waiting.push_preempted(request)

    def _release(self, request: Request, slots: int, *, resumes: bool) -> None:
        self.kv.release(request, slots, resumes=resumes)
        self.kv.put_back_blank(self.config.window_blocks)

    def _execute(self, batch: list[tuple[Request, int]]) -> None:
        decodes = [request for request, _ in batch if request.decoding]
        prefills = [(request, tokens) for request, tokens in batch if not request.decoding]
        new = sum(tokens for _, tokens in prefills)
        context, growth, pairs, read = [], [], [], []
        for window in self.windows:
            reach = window or 1 << 62
            context.append(sum(min(request.computed + 1, reach) for request in decodes))
            growth.append(sum(request.computed + 1 < reach for request in decodes))
            pairs.append(sum(attended_pairs(tokens, request.computed, window) for request, tokens in prefills))
            read.append(sum(context_read(tokens, request.computed, window) for request, tokens in prefills))
        tokens = len(decodes) + new
        emitting = len(decodes) + sum(request.computed + chunk == request.target for request, chunk in prefills)
        seconds = self.steps.step_seconds(
            tokens, len(batch), len(decodes), tuple(context), new, tuple(pairs), tuple(read)
        )
        self.recorder.segment((
            self.now, 1, seconds, 0.0, tokens, len(batch), len(decodes), 0, emitting, new, len(self.running),
            len(self.waiting) + len(self.incoming), self.kv.total - self.kv.free, *context, *growth, *pairs, *read,
        ))  # fmt: skip
        self.scheduled_tokens += tokens
        self.batch = batch
        self.last_start = self.now
        self.now += seconds

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)
