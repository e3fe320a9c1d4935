"""What the outside sees of an engine, fast or stepwise: requests in, hooks out, and the counters of conservation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable
from math import inf

from perfsim.cost.step_model import StepModel
from perfsim.cost.warm_up import WarmUp
from perfsim.ops.step import FULL, Span
from perfsim.serving.acceptance import Acceptance
from perfsim.serving.adapters import AdapterSlots
from perfsim.serving.config import EngineConfig
from perfsim.serving.deadlines import Deadlines
from perfsim.serving.kv_cache import KVCache
from perfsim.serving.offload import Offload
from perfsim.serving.recorder import Recorder
from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS
from perfsim.serving.waiting import FcfsQueue, PriorityQueue, WaitingQueue
from perfsim.serving.work import Work

Hook = Callable[[Request, float], None]


class EngineFront(ABC):
    """The part that both engines share; `submit` requests in order of time.

    Hooks, all called with a request and the time: `on_finish` when its last token is out, it is rejected or given up,
    `on_handover` when a prefill-only engine has its first token, `on_reserve` when blocks are set aside for a prompt
    whose K/V come from elsewhere.
    """

    running: Collection[Request]

    # Beyond thirty attributes CPython gives up on sharing their names among objects, and finds all of them later.
    __slots__ = (
        "_drafted", "_fits", "abroad", "acceptance", "config", "deadlines", "done", "in_flight", "incoming", "kv",
        "loaded", "loaded_tokens", "lost_gap_seconds", "lost_gaps", "lost_seconds", "lost_tokens",
        "moved_tokens", "notices", "now", "offload", "on_finish", "on_handover", "on_reserve", "on_wake",
        "population", "preemptions", "ready", "recorder", "request_seconds", "saved_tokens", "scheduled_tokens",
        "skipped", "slots", "steps", "submitted", "until", "waiting", "warm_up", "windows", "withdrawn", "work",
    )  # fmt: skip

    def __init__(
        self, *, config: EngineConfig, steps: StepModel, recorder: Recorder, windows: tuple[Span, ...] = (FULL,),
        on_finish: Hook | None = None,
    ) -> None:  # fmt: skip
        self.config = config
        self.steps = steps
        self.recorder = recorder
        self.windows = windows
        self.acceptance = Acceptance(config.acceptance, seed=config.seed) if config.acceptance else None
        self.slots = AdapterSlots(config.max_loras, load_s=config.adapter_load) if config.max_loras else None
        self.warm_up = WarmUp(config.expert_kernels)
        self.skipped: list[Request] = []  # passed over while a batch is formed: their adapter finds no place in it
        self.on_finish = on_finish
        self.on_handover: Hook | None = None
        self.on_reserve: Hook | None = None
        self.on_wake: Callable[[float, bool], None] | None = None  # a lock-step group keeps the clock of its ranks
        self.kv = KVCache(config.total_blocks, block_size=config.block_size, caching=config.prefix_caching)
        self.waiting: WaitingQueue = PriorityQueue() if config.priority else FcfsQueue()
        self.incoming: deque[Request] = deque()  # submitted, not yet seen by the scheduler
        self.notices: deque[tuple[float, Request]] = deque()  # K/V that have arrived or been fetched, not yet seen
        self.ready: deque[Request] = deque()  # their K/V have arrived, no slot yet
        self.loaded: WaitingQueue = PriorityQueue() if config.priority else FcfsQueue()  # theirs from the KV tier have
        self.abroad: dict[Request, None] = {}  # blocks set aside for K/V on their way in, or held on their way out
        self.withdrawn: dict[Request, None] = {}  # their K/V will never come, not yet seen
        self.deadlines = Deadlines(self, config.timeout)
        self.work: Work | None = None  # the steps in flight; more than one can still be cut short
        self.now = inf  # the next step boundary
        self.until = float("-inf")  # how far advance() may go; a hook may lower it
        self.done: Work | None = None  # the last steps executed
        self.in_flight = False
        self.submitted = self.preemptions = 0
        self.scheduled_tokens = 0
        self.saved_tokens = 0  # found in the prefix cache
        self.loaded_tokens = 0  # loaded from the KV tier
        self.lost_tokens = 0  # dropped by preemptions and failures
        self.moved_tokens = 0  # K/V that left to another engine, minus those that came from one
        self.lost_gaps = 0  # token gaps of requests that a failure stopped, and their seconds
        self.lost_gap_seconds = 0.0
        self.lost_seconds = 0.0  # time that such requests spent here
        self.population = 0  # requests in the engine, and its integral over time
        self.request_seconds = 0.0
        self._drafted = len(config.acceptance) + config.lookahead  # slots for drafts past the last token
        self._fits = 0  # tokens of a request up to which nobody need ask
        if not (config.window_blocks or config.span_blocks):
            pool = config.total_blocks * config.block_size + 1 - self._drafted
            longest = config.max_model_len if config.chunked_prefill else config.max_num_batched_tokens
            self._fits = min(config.max_model_len, pool, longest)
        self.offload = None if config.tier is None else Offload(self, config.tier)

    def submit(self, request: Request) -> None:
        """A request reaches the engine's queue at `request.queued`; never before what `advance` has passed.

        One with `remote` brings its first token along: its K/V are fetched once `on_reserve` has been called.
        """
        self.submitted += 1
        if request.prompt + request.output > self._fits and (reason := self._refused(request)):
            self.recorder.reject(reason)
            if self.on_finish is not None:
                self.on_finish(request, request.queued)
            return
        self.population += 1
        self.request_seconds -= request.queued  # as `count` does
        self.incoming.append(request)
        if self.config.timeout != inf:
            self.deadlines.add(request)
        self.wake(request.queued)

    def _refused(self, request: Request) -> str:
        """Why a request can never run; empty if it can. Sets the blocks that it holds `beside` its growing cache."""
        config = self.config
        length = request.prompt + (1 if config.prefill_only else request.output)
        request.beside = config.beside(length - 1)
        if length > config.max_model_len:
            return "longer than max_model_len"
        if -(-(length - 1 + self._drafted) // config.block_size) + request.beside > config.total_blocks:
            return "longer than the KV pool"
        if not config.chunked_prefill and length > config.max_num_batched_tokens:
            return "longer than max_num_batched_tokens without chunked prefill"
        return ""

    def notify(self, request: Request, at: float) -> None:
        """The transfer of a request's K/V has ended: into the blocks set aside for them, or out of those held."""
        self.notices.append((at, request))
        self.wake(at)

    def withdraw(self, request: Request, at: float) -> None:
        """A prompt's K/V will never come from elsewhere: the scheduler drops the request when it next looks."""
        self.withdrawn[request] = None
        self.notify(request, at)

    def advance(self, until: float) -> None:
        """Simulate every boundary before `until`; what is in flight then ends later, but can be cut short by events."""
        self.until = until
        while self.now < self.until - TIME_EPS:
            self.complete()
            if self.now >= self.until - TIME_EPS:
                return  # a hook announced an arrival at this very boundary
            work = self.plan()
            if work is None:
                self.now = inf if self.offload is None else self.offload.rest()
                continue
            self.price(work)
            if self.offload is not None:
                work.count = self.offload.steps(work, runs=True)
            if self.deadlines.heap:
                self.deadlines.stop(work)
            self.now = work.end()

    def drain(self) -> None:
        """Run until nothing is left to do."""
        self.advance(inf)
        if not self.idle:
            raise RuntimeError("the engine stopped with work left: a scheduling bug")

    @abstractmethod
    def complete(self) -> None:
        """Apply what the steps that end now have produced."""

    @abstractmethod
    def plan(self) -> Work | None:
        """Choose the next step, or run of equal steps, still without times; None when there is nothing to run."""

    @abstractmethod
    def price(self, work: Work) -> None:
        """Set the times of `work`, and end it where its steps no longer last affinely longer."""

    @abstractmethod
    def fail(self, at: float) -> list[Request]:
        """Lose everything at the end of the step in flight at `at`; the requests that were here, as if unseen.

        What that step completes is still delivered; the hooks may therefore speak of a time after `at`.
        """

    def next_event(self) -> float:
        """When something may happen that others can see: the end of the steps in flight; inf when there are none."""
        return self.now

    def wake(self, at: float) -> None:
        """Something happens at `at` that the scheduler must see at the next boundary."""
        if self.on_wake is not None:
            self.on_wake(at, self.work is not None)
        elif self.work is None:
            self.now = min(self.now, at)
        elif self.work.count > 1:  # under async scheduling the batch of the step after this one is formed already
            self.work.cut(at, ahead=1 if self.config.async_scheduling else 0)
            self.now = self.work.end()

    def count(self, change: int, at: float) -> None:
        """`change` requests more are in the engine from `at` on."""
        self.request_seconds -= change * at  # entered; those that leave add when they did
        self.population += change

    @property
    def last_start(self) -> float:
        """When the step that ends now began, or the last one that was executed."""
        return float("-inf") if self.done is None else self.done.last_start()

    @property
    def cut_off_tokens(self) -> int:
        """Accepted drafts beyond the end of a request."""
        return 0 if self.acceptance is None else self.acceptance.cut_off

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do, here or for others."""
        return not (self.waiting or self.incoming or self.notices or self.ready or self.abroad or self.population)

    @property
    def aside(self) -> int:
        """Requests that are neither running nor in the queue, because of the KV tier or of their adapter."""
        return len(self.skipped) + (0 if self.offload is None else self.offload.aside)

    def see(self, cutoff: float) -> bool:
        """Queue what has arrived up to `cutoff`; whether the head of the queue may have become admissible."""
        incoming, seen = self.incoming, False
        while incoming and incoming[0].queued <= cutoff + TIME_EPS:
            request = incoming.popleft()
            seen = seen or self.config.priority or not self.waiting or self.config.max_loras > 0
            self.waiting.push(request)
        if self.deadlines.heap:
            seen = self.deadlines.expire(cutoff) or seen
        while self.notices and self.notices[0][0] <= cutoff + TIME_EPS:
            _, request = self.notices.popleft()
            if request in self.withdrawn:
                self._drop(request)
                seen = True
                continue
            if self.abroad.pop(request, 0) == 0:
                continue  # a failure came first
            if request.remote:
                request.remote = False  # from now on it is like any other; a preemption computes its prompt again
                self.ready.append(request)
            else:
                self.let_go(request)
                seen = True
        return seen

    def leave(self, request: Request) -> float:
        """Take a running request off the engine's lists; the time of its last token."""
        raise RuntimeError(f"{type(self).__name__} cannot drop a running request: the planner refuses timeouts for it")

    def set_aside(self, request: Request) -> bool:
        """Blocks for the head of the queue, a prompt whose K/V come from elsewhere; False when there are not enough.

        What the prefix cache holds already need not be fetched: `fetched` says how many tokens are.
        """
        config, kv, size = self.config, self.kv, self.config.block_size
        hits, idle = kv.lookup(request, request.prompt // size)
        new = -(-request.prompt // size) - hits + request.beside
        if new + idle + (config.watermark_blocks if self.population > 1 else 0) > kv.free:
            return False
        self.waiting.take()
        kv.acquire(request, hits)
        kv.take(new)
        self.saved_tokens += hits * size
        self.moved_tokens -= request.prompt - hits * size
        request.computed = request.prompt
        request.blocks = -(-request.prompt // size)
        request.fetched = request.prompt - hits * size
        self.abroad[request] = None
        if self.on_reserve is not None:
            self.on_reserve(request, self.now)
        return True

    def skip_head(self, active: Collection[int]) -> bool:
        """Take the head of the queue aside if its adapter would be one too many beside the `active` ones."""
        adapter, most = self.waiting.head().adapter, self.config.max_loras
        if not most or adapter < 0 or adapter in active or len(active) < most:
            return False
        self.skipped.append(self.waiting.take())
        return True

    def unskip(self) -> None:
        """Those taken aside go back to the front of the queue, in their order."""
        for request in reversed(self.skipped):
            self.waiting.push_preempted(request)
        self.skipped.clear()

    def give_back(self, request: Request, tokens: int, *, unhashed: int = 0, resumes: bool = False) -> None:
        """Free the blocks of a request that has slots for `tokens` tokens, of which the last ones are not hashed."""
        self.kv.release(request, tokens, hashed=tokens - unhashed, resumes=resumes)
        if self.offload is not None and not resumes:
            self.offload.leave(request)
        if request.beside:
            self.kv.put_back_blank(request.beside)

    def let_go(self, request: Request) -> None:
        """Free the blocks of a request that will compute nothing more here.

        Slots of rejected drafts and of the lookahead hold nothing. Neglected: under synchronous scheduling vLLM has not
        hashed what the last verification accepted.
        """
        if self.acceptance is None:
            self.give_back(request, request.computed)
        else:
            slots = request.blocks * self.config.block_size
            self.give_back(request, slots, unhashed=slots - request.computed)

    def finish(self, request: Request) -> None:
        """A request's last token is out."""
        now = request.finish = self.now
        self.population -= 1
        self.request_seconds += now
        self.recorder.finish(request)
        if self.on_finish is not None:
            self.on_finish(request, now)

    def _drop(self, request: Request) -> None:
        del self.withdrawn[request]
        if self.abroad.pop(request, 0) is None:
            self.let_go(request)
        else:
            self.waiting.drop(request)
        self.forget(request, request.last_token)

    def hand_over(self, request: Request) -> None:
        """A prefill-only engine has the first token: the request goes on elsewhere, its blocks wait to be fetched."""
        self.count(-1, self.now)
        self.moved_tokens += request.computed
        self.abroad[request] = None
        if self.on_handover is not None:
            self.on_handover(request, self.now)

    def abandon(self, running: Iterable[tuple[Request, float]]) -> list[Request]:
        """Lose everything that is here: `running` requests with the time of their last token, queues, and all blocks.

        Returns the requests, as if no engine had seen them. Blocks held for other engines are gone too: the caller
        knows who waits for them.
        """
        lost = []
        for request, last_token in running:
            lost.append(request)
            self.forget(request, last_token)
        arriving = [request for request in self.abroad if request.remote]
        if self.offload is not None:
            arriving += self.offload.abandon()
        while self.waiting:
            lost.append(self.waiting.take())
            self.forget(lost[-1], lost[-1].last_token)
        for request in (*self.ready, *arriving, *self.incoming):
            lost.append(request)
            self.forget(request, request.last_token)
        mine = (self.ready, self.loaded, self.abroad, self.incoming, self.notices, self.withdrawn, self.deadlines.heap)
        for queue in mine:
            queue.clear()
        self.kv = KVCache(
            self.config.total_blocks, block_size=self.config.block_size, caching=self.config.prefix_caching
        )
        self.now, self.in_flight = inf, False
        return lost

    def forget(self, request: Request, last_token: float, *, again: bool = True) -> None:
        """A request will not finish here, but may come `again` as if nobody had seen it."""
        self.count(-1, self.now)
        self.lost_tokens += request.computed
        self.lost_seconds += self.now - request.queued
        if request.emitted > 1:
            self.lost_gaps += request.emitted - 1
            self.lost_gap_seconds += last_token - request.first_token
        if again:
            request.reset()
