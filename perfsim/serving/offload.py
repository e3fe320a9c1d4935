"""KV offload as an engine sees it: prompts whose K/V are loaded from the host, and blocks that go there.

As in vLLM's scheduler with its offloading connector (`vllm/v1/core/sched/scheduler.py` and
`distributed/kv_transfer/kv_connector/v1/offloading/`, 0.32). When the tier has more of the prompt at the head of the
queue than device memory has, blocks are set aside for both and the load begins with the next step; the request needs no
slot meanwhile. Once its K/V are there it goes before the queue, and computes the rest: of a prompt found whole, the
last token. A prompt with chunks on their way is passed over for now. Loading is never weighed against computing. Only
chunks of prompts are stored; the store begins with the step after the one that computes them.

The workers report what has ended once per step, after its launch. So it counts for the scheduler when the report is in:
one step later than an arrival at that moment would, under async scheduling two.

Neglected: waiting for a store before its blocks are used again or its request is preempted; and that under async
scheduling a request in flight is left out of a step before it can be preempted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perfsim.cost.host_tier import TierPlan
from perfsim.serving.kv_tier import KvTier
from perfsim.serving.request import Request
from perfsim.serving.timing import TIME_EPS, run_seconds, steps_until
from perfsim.serving.work import Work

if TYPE_CHECKING:
    from perfsim.serving.front import EngineFront

Chunks = Sequence[tuple[Request, int]]
NOTHING, GONE, FREED, AGAIN = "nothing", "gone", "freed", "again"


class Offload:
    """The tier of one engine and the requests on their way through it.

    `loading` requests have blocks, so many, but no slot; those of them whose K/V are there are in the engine's `loaded`
    queue. `delayed`: somebody was passed over when the queue was last looked at.
    """

    def __init__(self, engine: EngineFront, plan: TierPlan) -> None:
        config = engine.config
        self.engine = engine
        self.tier = KvTier(plan, block_size=config.block_size, exclusive=config.prefix_caching)
        self.loading: dict[Request, int] = {}
        self.delayed = False
        self._passed_over = False
        self._starved: dict[Request, int] = {}  # the tier had no room for what they computed, in that version
        self.crowded_out = 0  # stores that found no room, for now at least
        self._left: list[Request] = []  # have finished, the tier does not know yet
        self._lag = 3 if config.async_scheduling else 1
        self._starts: deque[float] = deque(maxlen=self._lag)  # of the last steps
        self._busy_until = float("-inf")

    @property
    def aside(self) -> int:
        """Requests that are neither running nor in the queue."""
        return len(self.loading)

    # --- time -------------------------------------------------------------------------------------------------------

    def see(self, *, everything: bool = False) -> bool:
        """Take note of transfers that have ended, as far as the workers have reported it; whether any has."""
        now = self.engine.now
        reported = self._starts[0] if self._starts and not everything and self._running(now) else now
        arrived, changed = self.tier.see(reported)
        for request in arrived:
            self.engine.loaded.push(request)
        return changed

    def stepped(self, work: Work) -> None:
        """Steps have been executed: the stores decided with them begin."""
        if not self._running(work.start):
            self._starts.clear()
        for step in range(max(0, work.count - self._lag), work.count):
            self._starts.append(work.start + run_seconds(step, work.first, work.slope))
        self._busy_until = work.end()
        self.tier.submit(self.engine.now)
        if work.count > 1:
            self._part()  # with the second step

    def rest(self) -> float:
        """There is nothing to run: stores begin at once. When to look again, inf for never."""
        self.tier.submit(self.engine.now)
        return self.next_event()

    def next_event(self) -> float:
        """When the next transfer ends that somebody waits for; inf if there is none."""
        tier = self.tier
        end = tier.loads.next_end()
        return min(end, tier.stores.next_end()) if self.delayed or self._starved else end

    def steps(self, work: Work, *, runs: bool) -> int:
        """How many steps of `work` can be taken before the scheduler has to look again; `runs`: they are this engine's.

        A report comes in with a later step of the engine that waits for it; one that has nothing to run sees at once.
        """
        if work.count == 1:
            return 1
        if self.delayed or self.tier.decided or (self._starved and not self._starved.keys().isdisjoint(self._left)):
            return 1
        at = self.next_event()
        if at <= work.start + TIME_EPS:
            return 1
        if at == float("inf"):
            return work.count
        ended = steps_until(at - TIME_EPS, now=work.start, first=work.first, slope=work.slope, most=work.count)
        return min(work.count, ended + (self._lag if runs else 0))

    def _running(self, at: float) -> bool:
        return at <= self._busy_until + TIME_EPS

    # --- admission --------------------------------------------------------------------------------------------------

    def fetch(
        self, request: Request, hits: int, idle: int, *, prefilling: Sequence[Request], chunks: Chunks, occupied: bool
    ) -> str:  # fmt: skip
        """Load what the tier has of the head of the queue behind its `hits` blocks on the device.

        NOTHING is to be loaded, or it is GONE from the queue: it loads, or is passed over. Else it has to wait, and
        everybody behind it: until blocks are FREED, or until it finds less on the device (AGAIN), and has less to load.
        `prefilling` requests still need blocks after the `chunks` of this step; `occupied`: somebody runs.
        """
        engine, config, size = self.engine, self.engine.config, self.engine.config.block_size
        found = self.tier.lookup(request, hits)
        if found is None:
            engine.skipped.append(engine.waiting.take())
            self._passed_over = True
            return GONE
        if not found:
            return NOTHING
        kv, target = engine.kv, request.prompt + request.emitted
        room = kv.free - idle - (config.watermark_blocks if occupied else 0)
        if config.reserve_full_isl and -(-target // size) - hits + request.beside > room:
            return FREED
        new = found + request.beside
        if new > room - self._promised(prefilling, chunks):
            return AGAIN if hits else FREED
        engine.waiting.take()
        if hits:
            kv.acquire(request, hits)
        request.run = None
        kv.take(new)
        held = hits + found
        request.computed = min(held * size, target - 1)
        engine.saved_tokens += hits * size
        engine.loaded_tokens += request.computed - hits * size
        if request.scheduled < 0.0:
            request.cached, request.loaded = hits * size, request.computed - hits * size
        self.loading[request] = held
        self.tier.load(request, hits, found, engine.now)
        return GONE

    def admit(self, *, most: int, budget: int, occupied: bool) -> tuple[Request, int] | None:
        """Admit the first request whose K/V have come; (it, the tokens it may compute now), None if it has to wait.

        `most` tokens are the share of one prompt; `occupied`: somebody runs.
        """
        engine, config, size = self.engine, self.engine.config, self.engine.config.block_size
        request, kv = engine.loaded.head(), engine.kv
        held = self.loading[request]
        if request.keys:
            kv.commit(request, held)
        target = request.prompt + request.emitted
        chunk = min(target - request.computed, most)
        if chunk > budget:
            if not config.chunked_prefill:
                return None
            chunk = budget
        blocks = max(held, -(-(request.computed + chunk + config.lookahead) // size))
        whole = -(-target // size) - held if config.reserve_full_isl else 0
        room = kv.free - (config.watermark_blocks if occupied else 0)
        if max(blocks - held, whole) > room:
            return None
        engine.loaded.take()
        del self.loading[request]
        kv.take(blocks - held)
        request.blocks = blocks
        if request.scheduled < 0.0:
            request.scheduled = max(engine.now, request.queued)
        if request.keys:
            kv.commit(request, (request.computed + chunk) // size)
        return request, chunk

    def looked(self) -> None:
        """The queue has been looked at."""
        self.delayed, self._passed_over = self._passed_over, False

    def _promised(self, prefilling: Sequence[Request], chunks: Chunks) -> int:
        """Blocks that prompts under way still need."""
        size, ahead = self.engine.config.block_size, self.engine.config.lookahead
        granted = dict(chunks)
        need = 0
        for request in prefilling:
            computed = request.computed + granted.get(request, 0) + ahead
            need += max(0, -(-(request.prompt + request.emitted) // size) - -(-computed // size))
        for request, held in self.loading.items():
            need += -(-(request.prompt + request.emitted) // size) - held
        return need

    # --- stores -----------------------------------------------------------------------------------------------------

    def planned(self, chunks: Chunks) -> bool:
        """A batch has been formed: what it computes goes to the host, as does what found no room there before.

        Prompt `chunks` are what it computes of whom. Decodes that found no room try again when that may help. Whether
        anything is stored: whoever would find it is passed over for as long, so that the queue has to be asked again.
        """
        batch = [(request, request.computed + chunk) for request, chunk in chunks]
        again = [(request, request.prompt) for request in self._starved
                 if request.decoding and self._starved[request] != self.tier.version]  # fmt: skip
        self.scheduled(sorted(batch + again, key=_place) if again else batch)
        return bool(self.tier.decided)

    def scheduled(self, batch: Chunks) -> None:
        """A batch has been formed: (request, tokens of it that will be computed then), in the engine's order."""
        tier = self.tier
        for request, tokens in batch:
            if tier.offer(request, tokens):
                self._starved.pop(request, None)
            else:
                self.crowded_out += request not in self._starved
                self._starved[request] = tier.version
        self._part()

    def _part(self) -> None:
        for request in self._left:
            if request in self._starved:
                self.tier.offer(request, request.prompt)
                del self._starved[request]
            self.tier.touch(request)
        self._left.clear()

    def holds(self, request: Request) -> bool:
        """Whether the K/V of a request are on their way here, or have come and wait for a slot."""
        return request in self.loading

    def forget(self, request: Request) -> None:
        """A request is given up: what found no room in the tier so far is not offered again."""
        self._starved.pop(request, None)

    def leave(self, request: Request) -> None:
        """A request has finished, and the scheduler knows."""
        self._left.append(request)

    def abandon(self) -> list[Request]:
        """Lose everything, the tier included; the requests that were loading."""
        lost = list(self.loading)
        self.loading.clear()
        self._starved.clear()
        self._left.clear()
        self._starts.clear()
        self._busy_until = float("-inf")
        self.delayed = False
        self.tier.clear()
        return lost

    def check(self) -> str:
        """What is wrong when all requests are done; empty when all is well."""
        self.tier.submit(self._busy_until)
        self.tier.see(float("inf"))
        return "requests are still loading K/V" if self.loading else self.tier.check()


def _place(scheduled: tuple[Request, int]) -> int:
    return scheduled[0].order
