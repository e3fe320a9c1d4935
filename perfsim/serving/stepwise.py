"""The same engine without shortcuts: every step is formed, priced and finished sequence by sequence.

It shares the block pool, the queue and the cost of one step with `Engine`, and nothing else: no sums over the batch, no
jumps, no completion heap. It is what the fast engine is tested against, and what `--stepwise` runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from perfsim.cost.step_model import NO_LORA, StepModel
from perfsim.ops.step import FULL, Span, prefill_sums
from perfsim.serving.config import EngineConfig
from perfsim.serving.front import EngineFront, Hook
from perfsim.serving.offload import GONE, NOTHING, Offload
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.work import Extras, Work

if TYPE_CHECKING:
    from perfsim.serving.pipeline import PipelineEngine


class StepwiseEngine(EngineFront):
    """Drop-in for `Engine`: `submit` in time order, `advance`, `drain`."""

    __slots__ = (
        "batch", "draws", "ended", "running", "unknown",
    )  # fmt: skip

    def __init__(
        self, *, config: EngineConfig, steps: StepModel, recorder: Recorder, windows: tuple[Span, ...] = (FULL,),
        on_finish: Hook | None = None,
    ) -> None:  # fmt: skip
        super().__init__(config=config, steps=steps, recorder=recorder, windows=windows, on_finish=on_finish)
        self.running: list[Request] = []
        self.batch: list[tuple[Request, int]] = []  # the step in flight: requests and their new tokens
        self.unknown: dict[Request, bool] = {}  # whose token the scheduler does not know yet; True: from a decode
        self.ended: list[Request] = []
        self.draws: dict[Request, list[int]] = {}  # accepted drafts per verification

    def fail(self, at: float) -> list[Request]:
        """As `Engine.fail`."""
        self.advance(at)
        if self.work is None:
            self.now = min(self.now, at)
        self.complete()
        lost = self.abandon([(request, request.last_token) for request in self.running if request not in self.ended])
        self.running, self.ended = [], []
        return lost

    def complete(self) -> None:
        """As `Engine.complete`."""
        kept = [(request, self._kept(request, tokens)) for request, tokens in self.batch]
        if self.work is not None:
            self._close(self.work, accepted=sum(tokens - 1 for request, tokens in kept if request.decoding))
        self.unknown = {}
        for request, tokens in kept:
            request.computed += tokens
        for request, tokens in kept:
            if request.decoding or request.computed == request.target:
                self.unknown[request] = request.decoding
                self._emit(request, tokens if request.decoding else 1)
                request.decoding = True
        self.batch = []

    def leave(self, request: Request) -> float:
        """As `Engine.leave`."""
        self.running.remove(request)
        self.unknown.pop(request, None)
        return request.last_token

    def _kept(self, request: Request, tokens: int) -> int:
        """How many of the `tokens` computed for a request stay: not rejected drafts, nor what is beyond its end."""
        if self.acceptance is None or not request.decoding:
            return tokens
        if request not in self.draws:
            self.draws[request] = self.acceptance.accepted(request.index, request.output).tolist()
        emitted = 1 + min(self.draws[request][request.rounds], tokens - 1)
        kept = min(emitted, request.output - request.emitted)
        request.rounds += 1
        self.acceptance.cut_off += emitted - kept
        return kept

    def _emit(self, request: Request, tokens: int) -> None:
        if request.emitted == 0:
            request.first_token = self.now
        else:
            self.recorder.gap(self.now - request.last_token)
        request.last_token = self.now
        request.emitted += tokens
        if request.emitted == request.output:
            self.draws.pop(request, None)
            self.ended.append(request)
            self.finish(request)
        elif self.config.prefill_only:
            self.ended.append(request)
            self.hand_over(request)

    def plan(self) -> Work | None:
        """As `Engine.plan`."""
        lagging = self.in_flight and self.config.async_scheduling
        self.see(self.last_start if lagging else self.now)
        if self.offload is not None:
            self.offload.see()
        if not lagging:
            self.unknown = {}
            self._give_back()
        self._join_ready()
        preemptions = self.preemptions
        batch = self._form_batch()
        more = not batch and self.offload is not None and self.offload.see(everything=True)
        if more and not lagging:
            batch = self._form_batch()
        if not batch and lagging:
            self.unknown = {}
            self.see(self.now)
            self._give_back()
            self._join_ready()
            batch = self._form_batch()
        while not batch and self.preemptions > preemptions:
            preemptions = self.preemptions
            batch = self._form_batch()
        if lagging:
            self._give_back()
        self.in_flight = bool(batch)
        self.work = self._work(batch) if batch else None
        return self.work

    def price(self, work: Work) -> None:
        """The time of one step from the work of every sequence in it."""
        extras = work.extras
        adapters = NO_LORA if extras is None or not extras.lora_adapters else extras.lora
        work.first = self.steps.step_seconds(
            work.tokens, work.logits, work.decodes, work.context, work.prefill, work.pairs, work.read, adapters,
            (work.longest, work.longest_prompt),
        )  # fmt: skip
        work.first += 0.0 if extras is None else extras.load

    def _join_ready(self) -> None:
        while self.ready and len(self.running) < self.config.max_num_seqs:
            request = self.ready.popleft()
            if request.keys:
                self.kv.commit(request, request.computed // self.config.block_size)
            request.decoding = True
            self.running.append(request)

    def _give_back(self) -> None:
        for request in self.ended:
            self.running.remove(request)
            if request not in self.abroad:
                self.let_go(request)
        self.ended = []

    def _form_batch(self) -> list[tuple[Request, int]]:
        """vLLM's `Scheduler.schedule`, request by request."""
        config, kv = self.config, self.kv
        budget = config.max_num_batched_tokens
        threshold = config.long_prefill_token_threshold if len(self.running) + len(self.waiting) + self.aside > 1 else 0
        threshold = threshold or budget
        if not config.mixed_steps and (alone := self._prefills_alone()):
            return alone
        batch: list[tuple[Request, int]] = []
        order = [request for request in self.running if request.finish >= 0.0 or request not in self.ended]
        preempted: list[Request] = []
        at = 0
        while at < len(order) and budget > 0:
            request = order[at]
            if request.finish >= 0.0:  # its last token is in flight
                at += 1
                continue
            drafts = len(config.acceptance) if request.decoding else 0
            tokens = min(request.target - request.computed + drafts, threshold, budget)
            need = max(0, self._blocks(request.computed + tokens + config.lookahead) - request.blocks)
            while kv.free < need and request not in preempted:
                victim = order[-1]
                if config.priority:
                    victim = max(order, key=lambda other: (other.priority, other.queued, other.index))
                at -= order.index(victim) < at
                order.remove(victim)
                taken = sum(given for other, given in batch if other is victim)
                batch = [item for item in batch if item[0] is not victim]
                budget += taken
                self._preempt(victim, taken)
                preempted.append(victim)
            if request in preempted:
                break
            kv.take(need)
            request.blocks += need
            if request.keys and not request.decoding:
                kv.commit(request, (request.computed + tokens) // config.block_size)
            batch.append((request, tokens))
            budget -= tokens
            at += 1
        if not preempted and config.mixed_steps:
            self._admit(batch, budget, threshold)
            self.unskip()
        if self.offload is not None:
            self.offload.looked()
            self.offload.scheduled([(request, request.computed + tokens) for request, tokens in batch])
        return batch

    def _prefills_alone(self) -> list[tuple[Request, int]]:
        """As `schedule_alone`."""
        budget = self.config.max_num_batched_tokens
        batch: list[tuple[Request, int]] = []
        for request in [other for other in self.running if not other.decoding and other not in self.ended]:
            tokens = min(request.target - request.computed, budget)
            need = self._blocks(request.computed + tokens + self.config.lookahead) - request.blocks
            if not tokens or need > self.kv.free:
                return batch
            self.kv.take(need)
            request.blocks += need
            if request.keys:
                self.kv.commit(request, (request.computed + tokens) // self.config.block_size)
            batch.append((request, tokens))
            budget -= tokens
        self._admit(batch, budget, self.config.max_num_batched_tokens)
        self.unskip()
        return batch

    def _admit(self, batch: list[tuple[Request, int]], budget: int, threshold: int) -> None:
        """Second half of `Scheduler.schedule`: prompts whose K/V have been loaded, then the queue."""
        while (self.waiting or self.loaded) and budget > 0 and len(self.running) < self.config.max_num_seqs:
            if self.offload is not None and self.loaded:
                admitted = self.offload.admit(most=threshold, budget=budget, occupied=bool(self.running))
                if admitted is None:
                    return
                self.running.append(admitted[0])
                batch.append(admitted)
                budget -= admitted[1]
                continue
            if self.slots is not None and self.skip_head({other.adapter for other, _ in batch} - {-1}):
                continue
            if self.offload is not None:
                verdict = self._fetch(self.offload, batch)
                if verdict == GONE:
                    continue
                if verdict != NOTHING:
                    return
            if self.waiting.head().remote:
                if not self.set_aside(self.waiting.head()):
                    return
                continue
            chunk = admit_head(self, min(threshold, budget), budget)
            if not chunk:
                return
            batch.append((self.running[-1], chunk))
            budget -= chunk

    def _fetch(self, offload: Offload, batch: list[tuple[Request, int]]) -> str:
        head = self.waiting.head()
        hits, idle = self.kv.lookup(head, (head.target - 1) // self.config.block_size)
        prefilling = [other for other in self.running if not other.decoding and other not in self.ended]
        return offload.fetch(
            head, hits, idle, prefilling=prefilling, chunks=batch, occupied=bool(self.running)
        )  # fmt: skip

    def _preempt(self, request: Request, taken: int) -> None:
        """Take the blocks of a running request, `taken` tokens of this step included, even if it has just ended."""
        ended = request.finish >= 0.0
        # A token in flight from a prefill has a slot only if it has been taken in this step.
        slots = request.computed + taken
        unhashed = int(request in self.unknown and (taken > 0 or self.unknown[request]))
        if self.acceptance is not None:  # drafts, of this step or rejected, leave nothing
            slots, known = request.blocks * self.config.block_size, request.computed if request.decoding else slots
            unhashed = slots - known
        self.give_back(request, slots, unhashed=unhashed, resumes=not ended)
        self.preemptions += 1
        self.running.remove(request)
        if ended:
            self.ended.remove(request)
            return
        self.lost_tokens += request.computed
        request.computed = request.blocks = 0
        request.decoding = False
        request.preemptions += 1
        self.waiting.push_preempted(request)

    def _work(self, batch: list[tuple[Request, int]]) -> Work:
        decodes = [request for request, _ in batch if request.decoding]
        prefills = [(request, tokens) for request, tokens in batch if not request.decoding]
        new = sum(tokens for _, tokens in prefills)
        context = tuple(sum(span.attended(request.computed) for request in decodes) for span in self.windows)
        growth = (0,) * len(context)  # of one step, so that nobody needs it
        pairs, read = prefill_sums(self.windows, [(chunk, request.computed) for request, chunk in prefills])
        self.batch = batch
        work = Work(
            self.now, 1, sum(tokens for _, tokens in batch), len(batch), len(decodes), new, context, growth, pairs,
            read, len(self.waiting) + len(self.incoming), len(self.running),
        )  # fmt: skip
        work.longest_prompt = max((request.computed + tokens for request, tokens in prefills), default=0)
        work.longest = 0  # with drafts nobody keeps account of it
        if self.acceptance is None:
            work.longest = max((request.computed + 1 for request in decodes), default=0)
        if self.slots is not None:
            adapted = [(request.adapter, tokens) for request, tokens in batch if request.adapter >= 0]
            active = {adapter for adapter, _ in adapted}
            work.extras = Extras(0, sum(tokens for _, tokens in adapted), len(active), self.slots.use(active))
        if self.warm_up.compiles:
            extras = work.extras or Extras(0, 0, 0, 0.0)
            work.extras = extras._replace(load=extras.load + self.warm_up.wait(work.tokens))
        return work

    def _close(self, work: Work, *, accepted: int) -> None:
        work.emitted = accepted + sum(
            request.decoding or request.computed + tokens == request.target for request, tokens in self.batch
        )
        work.extras = (work.extras or Extras(0, 0, 0, 0.0))._replace(accepted=accepted)
        work.running, work.gaps, work.kv_blocks = len(self.running), 0, self.kv.total - self.kv.free
        self.recorder.segment(work)
        self.scheduled_tokens += work.tokens
        self.done = work
        self.work = None
        if self.offload is not None:
            self.offload.stepped(work)

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)


def admit_head(engine: StepwiseEngine | PipelineEngine, most: int, budget: int) -> int:
    """Admit the head of the queue if its blocks fit; the tokens it may compute now, 0 if it has to wait."""
    config, kv, size = engine.config, engine.kv, engine.config.block_size
    request = engine.waiting.head()
    hits, idle = kv.lookup(request, (request.target - 1) // size)
    cached = hits * size
    chunk = request.target - cached
    if not config.chunked_prefill and min(chunk, most if most < budget else chunk) > budget:
        return 0
    chunk = min(chunk, most)
    blocks = -(-(cached + chunk + config.lookahead) // size)
    new = blocks - hits + request.beside
    full = -(-(request.target) // size) - hits + request.beside
    watermark = config.watermark_blocks if engine.running else 0
    if max(new, full if config.reserve_full_isl else 0) + idle + watermark > kv.free:
        return 0
    engine.waiting.take()
    kv.acquire(request, hits)
    kv.take(new)
    engine.saved_tokens += cached
    request.computed, request.blocks = cached, blocks
    if request.scheduled < 0.0:
        request.scheduled, request.cached = max(engine.now, request.queued), cached
    engine.running.append(request)
    if request.keys:
        kv.commit(request, (cached + chunk) // size)
    return chunk
