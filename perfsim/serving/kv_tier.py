"""The KV tier in the host's DRAM: which chunks it holds, which of them are on their way, and who is evicted next.

Semantics follow vLLM's CPU offloading (`vllm/v1/kv_offload/cpu/manager.py`, `policies/lru.py`, 0.32): a chunk takes its
place when its store is decided, can be found when the store has ended, and cannot be evicted before that nor while it
is loaded. Recency is set when a chunk is put in (the head of a prompt first) and when a request that stored or loaded
it finishes (the tail first, so that the head is the most recent). A store that finds too few chunks to evict is left
out as a whole and tried again. Equal chunks that move together form one `Segment`, so that work is O(segments) and not
O(chunks), and the order of eviction is still that of single chunks.

The transfers of a direction come one after the other, loads and stores side by side. One takes
setup + blocks * seconds per block. Neglected: that small copies are slower, and waits of the device for a store whose
blocks are needed.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from operator import attrgetter

from perfsim.cost.host_tier import TierPlan
from perfsim.serving.host_link import Line, Range, Transfer
from perfsim.serving.request import Request

# Chunks of a prompt that share nothing with others have a key of their own, beyond all keys of traffic.
PRIVATE = 1 << 140
Draw = Callable[[str, Request, float, float, float], None]


class Segment:
    """Chunks `first` to `stop` of one key; `fresh` ones have not been touched since they were put in."""

    __slots__ = ("first", "fresh", "key", "live", "pins", "rank", "ready", "stop")

    def __init__(self, key: int, first: int, stop: int, rank: int) -> None:
        self.key = key
        self.first = first
        self.stop = stop
        self.rank = rank
        self.fresh = True
        self.ready = False
        self.pins = 0  # loads under way
        self.live = True

    @property
    def place(self) -> tuple[int, int]:
        """In the order of eviction."""
        return self.rank, self.first if self.fresh else -self.first

    @property
    def evictable(self) -> bool:
        return self.live and self.ready and not self.pins


class Passage:
    """What the tier remembers of one request while it is in the engine."""

    __slots__ = ("next", "spans", "stores", "used")

    def __init__(self, spans: list[Range]) -> None:
        self.spans = spans  # the chunks of its prompt
        self.next = 0  # the first chunk that has not been offered yet
        self.stores = 0  # its transfers to the tier that are under way
        self.used: set[tuple[int, int]] = set()  # chunks that become recent when it finishes

    def between(self, first: int, stop: int) -> Iterator[Range]:
        """The chunks from `first` up to `stop`, by key."""
        for key, begin, end in self.spans:
            if begin >= stop:
                return
            if end > first:
                yield key, max(begin, first), min(end, stop)


class KvTier:
    """The content of the tier. `exclusive`: a chunk that is being loaded for one request is not loaded for another."""

    def __init__(self, plan: TierPlan, *, block_size: int, exclusive: bool) -> None:
        self.plan = plan
        self.block_size = block_size
        self.exclusive = exclusive
        self.free = plan.chunks
        self.evictable = 0  # chunks that are ready and not being loaded
        self.segments: dict[int, list[Segment]] = {}
        self.loads, self.stores = Line(), Line()
        self.decided: list[Transfer] = []  # stores that start with the next step
        self.stored = self.evicted = 0  # chunks put in and taken out
        self.version = 0  # of what decides whether a store finds room
        self.draw: Draw | None = None
        self._heap: list[tuple[int, int, int, Segment]] = []
        self._ranks = self._pushes = self._count = 0

    def clear(self) -> None:
        """Everything is lost."""
        self.evicted += self.plan.chunks - self.free
        self.free, self.evictable = self.plan.chunks, 0
        self.segments, self._heap, self.decided, self._count = {}, [], [], 0
        for line in (self.loads, self.stores):
            line.under_way.clear()
            line.free_at = float("-inf")

    # --- what requests ask for --------------------------------------------------------------------------------------

    def lookup(self, request: Request, blocks: int) -> int | None:
        """How many blocks of the prompt can be loaded behind the first `blocks`; None: ask again later.

        Later, that is when a chunk is still on its way: into the tier, or out of it for somebody else.
        """
        passage, size = self.passage(request), self.plan.chunk_blocks
        if passage.stores:
            return None
        start = blocks // size
        last = passage.spans[-1][2] if passage.spans else 0
        if last * size - blocks < size:
            return 0
        stop, pending, busy = start, False, False
        for key, first, end in passage.between(start, last):
            for segment in self._over(key, first, end):
                if segment.first > stop:
                    break
                stop = min(segment.stop, end)
                pending = pending or not segment.ready
                busy = busy or segment.pins > 0
            if stop < end:
                break
        if pending:
            return None
        found = stop * size - blocks
        if found < size:
            return 0
        return None if busy and self.exclusive else found

    def load(self, request: Request, blocks: int, found: int, at: float) -> None:
        """Start to load `found` blocks behind the first `blocks`."""
        passage, size = self.passage(request), self.plan.chunk_blocks
        first, stop = blocks // size, (blocks + found) // size
        ranges = list(passage.between(first, stop))
        for segment in self._exactly(ranges):
            if not segment.pins:
                self.evictable -= segment.stop - segment.first
            segment.pins += 1
        passage.used.add((first, stop))
        passage.next = stop
        seconds = self.plan.setup + found * self.plan.load_s
        transfer = Transfer(request, ranges, found)
        start = self.loads.submit(transfer, at, seconds)
        if self.draw is not None:
            self.draw("load", request, start, transfer.end, found * self.plan.load_bytes)

    def offer(self, request: Request, tokens: int) -> bool:
        """Decide to store what the first `tokens` tokens add to the prompt's chunks; False when there is no room."""
        passage, size = self.passage(request), self.plan.chunk_blocks
        stop = min(tokens, request.prompt) // self.block_size // size
        first = passage.next
        if stop <= first:
            return True
        wanted = list(passage.between(first, stop))
        missing = []
        for key, begin, end in wanted:
            place = begin
            for segment in self._over(key, begin, end):
                if segment.first > place:
                    missing.append((key, place, segment.first))
                if segment.ready:
                    passage.used.add((max(segment.first, begin), min(segment.stop, end)))
                place = segment.stop
            if place < end:
                missing.append((key, place, end))
        passage.used.update((begin, end) for _, begin, end in missing)
        count = sum(end - begin for _, begin, end in missing)
        if count > self.free and not self._make_room(count - self.free, wanted):
            return False
        passage.next = stop
        if missing:
            self._insert(missing)
            passage.stores += 1
            self.decided.append(Transfer(request, missing, count * size))
        return True

    def submit(self, at: float) -> None:
        """A step begins: the stores decided with the one before it start."""
        for transfer in self.decided:
            start = self.stores.submit(transfer, at, self.plan.setup + transfer.blocks * self.plan.store_s)
            if self.draw is not None:
                self.draw("store", transfer.request, start, transfer.end, transfer.blocks * self.plan.store_bytes)
        self.decided.clear()

    def see(self, cutoff: float) -> tuple[list[Request], bool]:
        """Take note of what has ended up to `cutoff`: (requests whose K/V are there, whether anything has)."""
        arrived, stored = [], False
        for transfer in self.loads.ended(cutoff):
            for segment in self._exactly(transfer.ranges):
                segment.pins -= 1
                self._may_go(segment)
            arrived.append(transfer.request)
        for transfer in self.stores.ended(cutoff):
            for segment in self._exactly(transfer.ranges):
                segment.ready = True
                self._may_go(segment)
            self.passage(transfer.request).stores -= 1
            stored = True
        changed = stored or bool(arrived)
        self.version += changed
        return arrived, changed

    def touch(self, request: Request) -> None:
        """A request has finished: what it stored and loaded becomes the most recent, its head above its tail."""
        passage = self.passage(request)
        covered = 0
        ranges: list[Range] = []
        for first, stop in sorted(passage.used):
            ranges += passage.between(max(first, covered), stop)
            covered = max(covered, stop)
        behind: Segment | None = None
        for part in reversed(ranges):
            for segment in reversed(list(self._exactly([part]))):
                self._ranks += 1
                segment.rank, segment.fresh = self._ranks, False
                if behind is not None and _joins(segment, behind):
                    self._drop(behind)
                    segment.stop, segment.rank = behind.stop, behind.rank
                if segment.evictable:
                    self._push(segment)
                behind = segment

    def passage(self, request: Request) -> Passage:
        """What is known of a request's way through the tier."""
        if request.passage is None:
            spans, start, size = [], 0, self.plan.chunk_blocks
            last = request.prompt // self.block_size // size
            for key, end in zip(request.keys, request.ends, strict=True):
                stop = min(end // size, last)
                if stop > start:
                    spans.append((key, start, stop))
                    start = stop
            if start < last:
                spans.append((PRIVATE + request.index, start, last))
            request.passage = Passage(spans)
        passage: Passage = request.passage
        return passage

    def check(self) -> str:
        """What is wrong when all transfers have ended; empty when all is well."""
        held = [segment for segments in self.segments.values() for segment in segments]
        resident = sum(segment.stop - segment.first for segment in held)
        if self.free + resident != self.plan.chunks or self.stored != resident + self.evicted:
            return (
                f"{self.plan.chunks} chunks in the KV tier, {self.free} free and {resident} in use; {self.stored} were "
                f"stored and {self.evicted} evicted"
            )
        if self.evictable != resident or not all(segment.evictable for segment in held):
            return "chunks of the KV tier are still in use"
        return ""

    # --- segments ---------------------------------------------------------------------------------------------------

    def _over(self, key: int, first: int, stop: int) -> Iterator[Segment]:
        """The segments of a key with chunks between `first` and `stop`."""
        for segment in self.segments.get(key, ()):
            if segment.first >= stop:
                return
            if segment.stop > first:
                yield segment

    def _exactly(self, ranges: list[Range]) -> Iterator[Segment]:
        """The segments that make up what is held of `ranges`, cut where these begin and end."""
        for key, first, stop in ranges:
            for segment in list(self._over(key, first, stop)):
                inner = segment
                if segment.first < first:
                    inner = self._split(segment, first)
                if inner.stop > stop:
                    self._split(inner, stop)
                yield inner

    def _split(self, segment: Segment, at: int) -> Segment:
        """Cut a segment in two that keep their places; the second one."""
        second = Segment(segment.key, at, segment.stop, segment.rank)
        second.fresh, second.ready, second.pins = segment.fresh, segment.ready, segment.pins
        segment.stop = at
        insort(self.segments[segment.key], second, key=_first)
        self._count += 1
        if second.evictable:
            self._push(second)
        return second

    def _insert(self, ranges: list[Range]) -> None:
        self.version += 1
        for key, first, stop in ranges:
            self._ranks += 1
            self._count += 1
            insort(self.segments.setdefault(key, []), Segment(key, first, stop, self._ranks), key=_first)
            self.free -= stop - first
            self.stored += stop - first

    def _drop(self, segment: Segment) -> None:
        segment.live = False
        self._count -= 1
        own = self.segments[segment.key]
        own.remove(segment)
        if not own:
            del self.segments[segment.key]

    def _may_go(self, segment: Segment) -> None:
        if segment.evictable:
            self.evictable += segment.stop - segment.first
            self._push(segment)

    def _push(self, segment: Segment) -> None:
        self._pushes += 1
        heappush(self._heap, (*segment.place, self._pushes, segment))
        if len(self._heap) > max(64, 4 * self._count):  # entries of places that were left
            self._heap = [entry for entry in self._heap if entry[3].evictable and entry[3].place == entry[:2]]
            heapify(self._heap)

    def _make_room(self, count: int, wanted: list[Range]) -> bool:
        """Evict `count` chunks, none of those `wanted`; all or nothing."""
        if count > self.evictable:
            return False
        kept = set(self._exactly(wanted))
        chosen: list[tuple[int, int, int, Segment]] = []
        back, seen, left = [], set(kept), count
        while self._heap and left > 0:
            entry = heappop(self._heap)
            segment = entry[3]
            if not segment.evictable or segment.place != entry[:2]:
                continue
            if segment in kept:
                back.append(entry)
            elif segment not in seen:
                seen.add(segment)
                chosen.append(entry)
                left -= segment.stop - segment.first
        for entry in back if left <= 0 else (*back, *chosen):
            heappush(self._heap, entry)
        if left > 0:
            return False
        for entry in chosen:
            self._evict(entry[3], spared=-left if entry is chosen[-1] else 0)
        return True

    def _evict(self, segment: Segment, *, spared: int) -> None:
        """Take out a segment but for its `spared` chunks that would be the last to go."""
        gone = segment.stop - segment.first - spared
        self.evicted += gone
        self.evictable -= gone
        self.free += gone
        if not spared:
            self._drop(segment)
            return
        if segment.fresh:
            segment.first += gone
        else:
            segment.stop -= gone
        self._push(segment)


_first = attrgetter("first")


def _joins(segment: Segment, behind: Segment) -> bool:
    """Whether two segments that have just become recent are one from now on."""
    return segment.evictable and behind.evictable and segment.key == behind.key and segment.stop == behind.first
