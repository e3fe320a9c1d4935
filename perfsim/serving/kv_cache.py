"""Paged KV blocks with prefix caching, at the granularity of runs instead of single blocks.

Semantics follow vLLM V1's block pool: blocks are reference-counted; a freed block without a hash goes to the front of
the free queue, a hashed one to its end, a request's blocks in reverse, so that the least recently used and the deepest
are evicted first; a hit takes blocks out of the queue; of equal blocks that several requests have computed all are
findable, and the oldest is found. Blocks that always move together form one `Run`: the engine blocks behind one key of
a shared prompt, or everything else that a request leaves behind. A run is evicted from its end, so its resident part is
always its beginning, and all operations cost O(runs), not O(blocks).

Where this differs from a per-block pool, and only for keys of several blocks: a request whose hit ends inside a run
that is in use keeps all of that run in use; and of copies that requests computed in alternating chunks the order is
that of their first blocks.
"""

from __future__ import annotations

from collections import OrderedDict

from perfsim.serving.request import Request


class Run:
    """Blocks that are cached, touched and evicted together; `key` is None for what nobody can ask for by content.

    A run with a key holds the blocks `start` to `start + resident` of that key.
    """

    __slots__ = ("key", "refs", "resident", "start")

    def __init__(self, key: int | None, resident: int, start: int = 0) -> None:
        self.key = key
        self.resident = resident
        self.start = start
        self.refs = 0

    def covers(self, block: int) -> bool:
        """Whether the key's block number `block` is in this run."""
        return self.start <= block < self.start + self.resident


class KVCache:
    """The block pool of one replica. `free` counts blocks that can be allocated, cached ones included."""

    __slots__ = ("blank", "block_size", "caching", "copies", "free", "nodes", "queue", "tail", "total")

    def __init__(self, total: int, *, block_size: int, caching: bool) -> None:
        self.total = total
        self.free = total
        self.block_size = block_size
        self.caching = caching
        self.blank = total  # free blocks without content: they are always at the front of the queue
        self.queue: OrderedDict[Run, None] = OrderedDict()  # free blocks with content, next victim first
        self.tail: Run | None = None  # the anonymous run at the end of the queue, if there is one
        self.nodes: dict[int, Run] = {}  # the oldest run of a key
        self.copies: dict[int, OrderedDict[Run, None]] = {}  # all runs of a key that has several, the oldest first

    def lookup(self, request: Request, limit: int) -> tuple[int, int]:
        """(blocks of `request` found in the cache, at most `limit`; free-queue blocks that taking them would use)."""
        hits = idle = start = 0
        if not self.caching:
            return 0, 0
        for key, end in zip(request.keys, request.ends, strict=True):
            node = self._find(key, 0)
            want = min(end - start, limit - hits)
            have = 0
            while node is not None and have < want:
                stop = min(node.start + node.resident, want)
                if not node.refs:
                    idle += stop - have
                have = stop
                if have < want:
                    node = self._find(key, have)
            hits += have
            if have < end - start:
                return hits, idle
            start = end
        run = request.run
        if run is not None and request.run_start == start:
            found = min(limit - hits, run.resident)
            hits += found
            idle += found
        return hits, idle

    def acquire(self, request: Request, hits: int) -> None:
        """Take the `hits` blocks that `lookup` promised out of the free queue."""
        left = hits
        start = 0
        for index, end in enumerate(request.ends):
            if left <= 0:
                break
            want = min(left, end - start)
            have = 0
            while have < want and (node := self._find(request.keys[index], have)) is not None:
                have = self._hold(request, node, have, want)
            request.node_blocks += want
            request.position += want
            left -= want
            if want == end - start:
                request.node_index = index + 1
            start = end
        if left > 0 and request.run is not None:
            del self.queue[request.run]
            self.free -= left
            self.tail = None
            self.blank += request.run.resident - left
        request.run = None

    def take(self, count: int) -> None:
        """Allocate `count` blocks for one or many requests; the caller has checked `free`."""
        self.free -= count
        blank = self.blank
        if count <= blank:
            self.blank = blank - count
            return
        if blank:
            count -= blank
            self.blank = 0
        queue = self.queue
        while count:
            for run in queue:  # only the first of them, the next victim
                if run.resident > count:
                    run.resident -= count
                    return
                break
            count -= run.resident
            run.resident = 0
            queue.popitem(last=False)
            if run is self.tail:
                self.tail = None
            if run.key is not None:
                self._forget(run, run.key)

    def commit(self, request: Request, full_blocks: int) -> None:
        """Make the first `full_blocks` computed blocks findable under the request's keys, as far as these reach."""
        if not self.caching:
            return
        keys, ends, held = request.keys, request.ends, request.held
        while request.node_index < len(ends):
            index = request.node_index
            start = ends[index - 1] if index else 0
            covered = min(full_blocks, ends[index])
            if covered <= request.position:
                return
            mine = request.position - start
            if not (mine and self._grows(held[-1], mine)):
                held.append(self._create(keys[index], mine))
            held[-1].resident += covered - request.position
            request.node_blocks += covered - request.position
            request.position = covered
            if covered < ends[index]:
                return
            request.node_index = index + 1

    def release(self, request: Request, tokens: int, *, resumes: bool, hashed: int | None = None) -> None:
        """Free all blocks of a request with slots for `tokens` tokens; a preempted one `resumes` later.

        Blocks full of the first `hashed` tokens (all, unless some are still in flight) stay in the cache.
        """
        size = self.block_size
        full = (tokens if hashed is None else hashed) // size
        if request.node_index < len(request.ends):
            self.commit(request, full)  # keys that go on beyond the prompt: a later turn asks for what was generated
        private = -(-tokens // size) - request.node_blocks
        found = full - request.node_blocks if self.caching else 0
        self.free += private
        self.blank += private - found
        if found:
            if self.tail is not None and not resumes:
                self.tail.resident += found
            else:
                self._queue_private(request, found, keep=resumes)
        if request.held:
            for node in reversed(request.held):
                node.refs -= 1
                if not node.refs:
                    self.queue[node] = None
                    self.free += node.resident
                    self.tail = None
            request.held.clear()
        request.node_blocks = request.node_index = request.position = 0

    def put_back_blank(self, count: int) -> None:
        """Free `count` blocks that hold nothing worth finding."""
        self.blank += count
        self.free += count

    def check(self) -> str:
        """What is wrong with the pool when no request holds blocks; empty when all is well."""
        cached = sum(run.resident for run in self.queue)
        if self.free != self.total or self.blank + cached != self.total:
            return f"{self.total} KV blocks, but {self.free} free: {self.blank} blank and {cached} cached"
        if any(run.refs for runs in (self.nodes.values(), *self.copies.values()) for run in runs):
            return "a shared prefix is still referenced"
        return ""

    # --- runs under keys --------------------------------------------------------------------------------------------

    def _find(self, key: int, block: int) -> Run | None:
        """The oldest run with the key's block number `block`."""
        node = self.nodes.get(key)
        if node is None or node.start <= block < node.start + node.resident:
            return node
        return next((run for run in self.copies.get(key, ()) if run.covers(block)), None)

    def _hold(self, request: Request, run: Run, have: int, want: int) -> int:
        """A request begins to use `run` from the key's block `have` up to block `want`, if it reaches so far."""
        stop = min(run.start + run.resident, want)
        if not run.refs:
            if have > run.start or stop < run.start + run.resident:
                run = self._split(run, have, stop)
            else:
                del self.queue[run]
            self.free -= run.resident
        run.refs += 1
        request.held.append(run)
        return stop

    def _split(self, run: Run, first: int, stop: int) -> Run:
        """The blocks `first` to `stop` of a free run as a run of their own; the others keep their place in the queue.

        When some stay on both sides, the deeper ones go to the front of the queue instead.
        """
        end = run.start + run.resident
        parts = [Run(run.key, stop - first, first)]
        if first == run.start:
            run.start, run.resident = stop, end - stop
        else:
            run.resident = first - run.start
            if stop < end:
                parts.append(Run(run.key, end - stop, stop))
                self.queue[parts[1]] = None
                self.queue.move_to_end(parts[1], last=False)
        if run.key is not None:
            ordered: OrderedDict[Run, None] = OrderedDict()
            for other in self.copies.get(run.key, (run,)):
                ordered.update(dict.fromkeys([*parts, run] if other is run else [other]))
            self.copies[run.key] = ordered
            self.nodes[run.key] = next(iter(ordered))
        return parts[0]

    def _grows(self, run: Run, block: int) -> bool:
        """Whether `block` can join `run` as the next one; it is a copy of its own if another one is older."""
        if run.start + run.resident != block or run.key is None:
            return False
        copies = self.copies.get(run.key)
        return copies is None or next(reversed(copies)) is run or not any(other.covers(block) for other in copies)

    def _create(self, key: int, start: int) -> Run:
        """A run in use, still without blocks: the youngest one of its key."""
        run = Run(key, 0, start)
        run.refs = 1
        first = self.nodes.setdefault(key, run)
        if first is not run:
            self.copies.setdefault(key, OrderedDict(((first, None),)))[run] = None
        return run

    def _forget(self, run: Run, key: int) -> None:
        """The last block of a run is gone."""
        copies = self.copies.get(key)
        if copies is None:
            del self.nodes[key]
            return
        del copies[run]
        self.nodes[key] = next(iter(copies))
        if len(copies) == 1:
            del self.copies[key]

    def _queue_private(self, request: Request, count: int, *, keep: bool) -> None:
        run = Run(None, count)
        self.queue[run] = None
        if keep:
            request.run, request.run_start = run, request.node_blocks
            self.tail = None
        else:
            self.tail = run
