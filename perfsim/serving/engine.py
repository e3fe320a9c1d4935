"""One continuous-batching engine with vLLM V1's scheduling semantics, simulated from state change to state change.

The engine keeps the few sums over the batch that a step's cost depends on. While the batch stays the same it jumps over
all steps up to the next completion, arrival, exhausted block pool or breakpoint of the cost model in closed form; a
step with prefill work, an admission or a preemption is simulated on its own. Time is a sequence of step boundaries.

Under async scheduling the batch of a step is formed when the step before it starts: an arrival or a freed block is seen
one step later than under synchronous scheduling. When that batch would be empty the engine waits for the running step
and schedules again with everything in sight, as vLLM does.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop

from perfsim.cost.step_model import NO_LORA, StepModel
from perfsim.ops.step import FULL, Span, prefill_sums
from perfsim.serving.admission import admit
from perfsim.serving.batch import DecodeBatch
from perfsim.serving.config import EngineConfig
from perfsim.serving.front import EngineFront, Hook
from perfsim.serving.offload import Offload
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.running import schedule_running
from perfsim.serving.speculative_batch import SpeculativeBatch
from perfsim.serving.work import Extras, Sums, Work


class Engine(EngineFront):
    """A replica: `submit` requests in time order, `advance` to a time, `drain` at the end."""

    __slots__ = (
        "admissions", "batch", "blocked", "emitting", "ended", "late", "plain", "prefilling", "rejoining", "running",
        "special", "stalled", "zeros",
    )  # fmt: skip

    def __init__(
        self, *, config: EngineConfig, steps: StepModel, recorder: Recorder, windows: tuple[Span, ...] = (FULL,),
        on_finish: Hook | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config, steps=steps, recorder=recorder, windows=windows, on_finish=on_finish)
        self.zeros = (0,) * len(windows)
        self.running: dict[Request, None] = {}  # admission order
        self.prefilling: list[Request] = []
        self.emitting: list[Request] = []  # their prefill ends with the step in flight
        self.stalled: list[Request] = []  # decodes that get no token from the step in flight
        self.rejoining: list[Request] = []  # those of them that are not in the batch now
        self.late: list[Request] = []  # decodes that got none from the step before
        self.ended: list[Request] = []  # finished, blocks and slot not yet given back
        self._empty_batch()
        self.blocked = False  # the head of the queue cannot be admitted before something is freed
        self.admissions = 0
        self.special = self.acceptance is not None or self.slots is not None or self.warm_up.compiles

    def _empty_batch(self) -> None:
        config, windows = self.config, self.windows
        self.batch: DecodeBatch | SpeculativeBatch
        self.plain: DecodeBatch | None = None  # the batch, where only the unlimited span is attended
        if self.acceptance is None:
            self.batch = batch = DecodeBatch(block_size=config.block_size, windows=windows)
            self.plain = batch if windows == (FULL,) else None
        else:
            self.batch = SpeculativeBatch(
                block_size=config.block_size, windows=windows, acceptance=self.acceptance, lookahead=config.lookahead
            )

    def fail(self, at: float) -> list[Request]:
        """Lose everything at the end of the step in flight at `at`; the requests that were here, as if unseen.

        What that step completes is still delivered; the hooks may therefore speak of a time after `at`.
        """
        self.advance(at)
        if self.work is not None:
            self.work.cut(at, ahead=0)
            self.now = self.work.end()
        else:
            self.now = min(self.now, at)
        self.complete()
        running = []
        for request in self.running:
            if request in self.ended:
                continue
            token_now = request.decoding and request not in self.late
            if request.decoding:
                self.batch.leave(request)
            running.append((request, self.now if token_now else request.last_token))
        lost = self.abandon(running)
        self.running, self.prefilling, self.stalled, self.late, self.ended = {}, [], [], [], []
        self._empty_batch()
        self.blocked = False
        return lost

    def price(self, work: Work) -> None:
        """Set the times of `work`, and end it where its steps no longer last affinely longer."""
        extras = work.extras
        lora = NO_LORA if extras is None else extras.lora
        if work.tokens > work.decodes:  # prefill chunks, or drafts
            work.first = self.steps.step_seconds(
                work.tokens, work.logits, work.decodes, work.context, work.prefill, work.pairs, work.read, lora,
                (work.longest, work.longest_prompt),
            )  # fmt: skip
        else:
            work.count, work.first, work.slope = self.steps.plain_run(
                work.tokens, work.context, work.growth, work.count, lora, work.longest
            )
        if extras is not None:
            work.first += extras.load

    # --- one boundary -----------------------------------------------------------------------------------------------

    def complete(self) -> None:
        """Apply what the steps that end now have produced."""
        if self.work is not None:
            self._close(self.work)
        if self.late or self.stalled:
            self._late_gaps()
        now, batch = self.now, self.batch
        completions, step = batch.completions, batch.step
        while completions and completions[0][0] < step:
            _, _, stint, request = heappop(completions)
            if request.decoding and request.stint == stint:
                batch.leave(request)
                self._finish(request)
        if not self.emitting:
            return
        for request in self.emitting:
            if request.emitted == 0:
                request.first_token = now
            else:
                self.recorder.gap(now - request.last_token)
            request.emitted += 1
            if self.acceptance is not None:
                request.blocks = -(-(request.computed + self.config.lookahead) // self.config.block_size)
            if request.emitted == request.output:
                self._finish(request)
            elif self.config.prefill_only:
                self.ended.append(request)
                self.hand_over(request)
            else:
                batch.join(request)
        self.emitting = []

    def _late_gaps(self) -> None:
        for request in self.late:
            self.recorder.gap(self.now - request.last_token)
        self.late, self.stalled = self.stalled, []

    def plan(self) -> Work | None:
        """Choose the next step, or run of equal steps, still without times; None when there is nothing to run."""
        lagging = self.in_flight and self.config.async_scheduling
        if self.incoming or self.notices or self.deadlines.heap:
            self.blocked = not self.see(self.last_start if lagging else self.now) and self.blocked
        if self.offload is not None:
            self._see_tier(self.offload)
        if self.ended and not lagging:
            self._give_back()
        if self.ready:
            self._join_ready()
        preemptions = self.preemptions
        self.work = self._schedule()
        if self.work is not None:
            return self.work
        self.in_flight = False
        more = self.offload is not None and self._see_tier(self.offload, everything=True)
        if lagging:
            self.blocked = not self.see(self.now) and self.blocked
            if self.ended:
                self._give_back()
            self._join_ready()
        elif self.preemptions == preemptions and not more:
            return None
        self.work = self._schedule()
        while self.work is None and self.preemptions > preemptions:  # everyone was preempted: now blocks are free
            preemptions = self.preemptions
            self.work = self._schedule()
        return self.work

    def _see_tier(self, offload: Offload, *, everything: bool = False) -> bool:
        news = offload.see(everything=everything)
        if news:
            self.blocked = False
        return news

    def _join_ready(self) -> None:
        while self.ready and len(self.running) < self.config.max_num_seqs:
            self._join_remote(self.ready.popleft())

    def _join_remote(self, request: Request) -> None:
        """The K/V of a prompt have arrived: it decodes from the next step on, its first gap began elsewhere."""
        self.admissions += 1
        request.order = self.admissions
        self.running[request] = None
        if request.keys:
            self.kv.commit(request, request.computed // self.config.block_size)
            self.blocked = False  # the head of the queue may share them
        self.batch.join(request)
        self.late.append(request)

    def _give_back(self) -> None:
        """Free the blocks and slots of requests that ended."""
        if len(self.ended) > 1:
            self.ended.sort(key=_admission)  # vLLM goes through the running requests in order
        for request in self.ended:
            if request not in self.abroad:
                self.let_go(request)
            del self.running[request]
        self.ended.clear()
        self.blocked = False

    def _schedule(self) -> Work | None:
        """Form a batch as vLLM does: running requests first, then admissions while blocks, slots and budget last."""
        batch, kv = self.batch, self.kv
        if batch.size and not self.prefilling and (self.blocked or not (self.waiting or self.loaded)):
            need = batch.new_blocks()
            if need <= kv.free and batch.tokens <= self.config.max_num_batched_tokens:
                return self._decode_work(need)
        chunks, stalled, preempted = schedule_running(self)
        queued = self.config.mixed_steps and (self.waiting or self.loaded)  # without, admitted with the prompts alone
        if queued and not preempted and (chunks or not self.blocked):
            budget = self.config.max_num_batched_tokens - batch.tokens
            if chunks:
                budget -= sum(tokens for _, tokens in chunks)
            if budget > 0:
                admit(self, budget, chunks)
        self.stalled, self.rejoining = stalled, [*stalled]
        if chunks:
            return self._mixed_work(chunks)
        if self.batch.size:
            queued = self.waiting or self.loaded
            return self._decode_work(0, alone=bool(stalled or preempted or (queued and not self.blocked)))
        if self.offload is not None and self.offload.planned(()):
            self.blocked = False
        self._rejoin()
        # No step came between: only those who have waited for longer than that still owe a gap of their own.
        self.late += [request for request in stalled if request.last_token < self.now]
        self.stalled = []
        return None

    # --- executing --------------------------------------------------------------------------------------------------

    def _mixed_work(self, chunks: list[tuple[Request, int]]) -> Work:
        """One step with prefill work; decodes take part in it."""
        if self.offload is not None and self.offload.planned(chunks):
            self.blocked = False
        batch = self.batch
        decodes = batch.size
        new = longest = causal = entries = 0
        emitting = self.emitting
        for request, chunk in chunks:
            new += chunk
            past = request.computed
            request.computed = computed = past + chunk
            longest = computed if computed > longest else longest  # `max` of two numbers takes four times as long
            causal += chunk * past + chunk * (chunk + 1) // 2  # `prefill_sums` of the unlimited span
            entries += computed
            if computed == request.prompt + request.emitted:
                emitting.append(request)
        if len(emitting) == len(self.prefilling):
            self.prefilling = []
        elif emitting:
            self.prefilling = [request for request in self.prefilling if request not in emitting]
        if self.ended:
            self._give_back()
        self.blocked = False
        context, growth = batch.attended()
        pairs: Sums = (causal,)
        read: Sums = (entries,)
        if self.plain is None:
            pairs, read = prefill_sums(self.windows, [(chunk, request.computed - chunk) for request, chunk in chunks])
        work = Work(
            self.now, 1, batch.tokens + new, decodes + len(chunks), decodes, new, context, growth, pairs, read,
            len(self.waiting) + len(self.incoming), len(self.running),
        )  # fmt: skip
        work.gaps, work.emitted = decodes - len(self.late), decodes + len(emitting)
        work.longest, work.longest_prompt = batch.longest, longest
        return self._special(work, chunks) if self.special else work

    def _decode_work(self, need: int, *, alone: bool = False) -> Work:
        """As many equal decode steps as nothing can change in, or one `alone`; the first one takes `need` blocks."""
        batch, kv = self.batch, self.kv
        if self.incoming or self.notices or (self.ended and (self.waiting or self.ready or self.loaded)):
            alone = True  # what arrived or was freed during the step in flight counts from the next one on
        elif self.late:
            alone = True  # their gap is not as long as the step
        if need:
            kv.take(need)
        if self.offload is not None and self.offload.planned(()):
            self.blocked = False
        if self.ended:
            self._give_back()
        size, zeros, count = batch.size, self.zeros, 1
        plain = self.plain  # `attended`, without a call
        context, growth = batch.attended() if plain is None else ((plain.context,), (size,))
        if not alone:
            count = batch.steps_left()
            if kv.free < size * (count // batch.block_size + 1):
                count = batch.steps_with_blocks(kv.free, count)
        work = Work(
            self.now, count, batch.tokens, size, size, 0, context, growth, zeros, zeros,
            len(self.waiting) + len(self.incoming), len(self.running),
        )  # fmt: skip
        work.gaps, work.emitted = size - len(self.late), size
        work.longest, work.longest_prompt = batch.longest, 0
        return self._special(work, ()) if self.special else work

    def _special(self, work: Work, chunks: Sequence[tuple[Request, int]]) -> Work:
        """Count the drafts that a step will accept, and its adapters, which are brought to the GPU."""
        work.emitted += self.batch.accepted
        tokens, active, load = 0, set[int](), self.warm_up.wait(work.tokens)
        if self.slots is not None:
            tokens = self.batch.adapted_tokens() + sum(chunk for request, chunk in chunks if request.adapter >= 0)
            active = self.adapters(chunks)
            load += self.slots.use(active)
        work.extras = Extras(self.batch.accepted, tokens, len(active), load)
        if load:
            work.count = 1  # the other steps do not wait
        return work

    def adapters(self, chunks: Sequence[tuple[Request, int]]) -> set[int]:
        """The distinct adapters of the decoding requests and of those that compute `chunks`."""
        return {*self.batch.adapters.counts, *(request.adapter for request, _ in chunks)} - {-1}

    def _close(self, work: Work) -> None:
        """The steps in flight have been executed: write the segment down and move the sums to its end."""
        batch, kv, count = self.batch, self.kv, work.count
        if count > 1:
            kv.take(batch.blocks_in_run(count))
        work.kv_blocks = kv.total - kv.free
        self.recorder.segment(work)
        self.scheduled_tokens += count * work.tokens
        self.done = work
        self.in_flight = True
        self.work = None
        if self.offload is not None:
            self.offload.stepped(work)
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
        self.ended.append(request)
        if self.slots is not None:
            self.blocked = False  # its adapter may make room for another one
        self.finish(request)

    def stall(self, request: Request) -> None:
        """A decode that gets no token in this step: off the sums until the step is over."""
        if request in self.late:
            self.late.remove(request)
        else:
            request.last_token = self.now
        self.batch.leave(request)
        if self.slots is not None:
            self.blocked = False

    def leave(self, request: Request) -> float:
        """Take a running request off the lists and sums; the time of its last token."""
        del self.running[request]
        if not request.decoding:
            self.prefilling.remove(request)
            return request.last_token
        self.batch.leave(request)
        if request not in self.late:
            return self.now
        self.late.remove(request)
        return request.last_token

    def preempt(self, request: Request, tokens: int, unhashed: int) -> None:
        """Take a running request's blocks (slots for `tokens` tokens) and queue it again, unless it has just ended."""
        ended = request.finish >= 0.0
        self.give_back(request, tokens, unhashed=unhashed, resumes=not ended)
        del self.running[request]
        self.preemptions += 1
        self.blocked = False
        if ended:
            self.ended.remove(request)
            return
        if request.decoding:
            self.stall(request)
        else:
            self.prefilling.remove(request)
        self.lost_tokens += request.computed
        request.computed = 0
        request.preemptions += 1
        self.waiting.push_preempted(request)


def _admission(request: Request) -> int:
    return request.order
