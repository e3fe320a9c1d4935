"""Paged KV blocks with prefix caching, at the granularity of runs instead of single blocks.

Semantics follow vLLM V1's block pool: blocks are reference-counted; a freed block without a hash goes to the front of
the free queue, a hashed one to its end, a request's blocks in reverse, so that the least recently used and the deepest
are evicted first; a hit takes blocks out of the queue. Blocks that always move together form one `Run`: the engine
blocks behind one key of a shared prompt, or everything else that a request leaves behind. A run is evicted from its
end, so its resident part is always its beginning, and all operations cost O(runs), not O(blocks).

Where this differs from a per-block pool: of a run that a hit takes only in part (a prompt cached to its last block, of
which one must be recomputed) the rest is evicted first, not in its turn; and when two requests compute the same run at
the same time, the second copy is private and is not found again after the first is evicted.
"""

from __future__ import annotations

from collections import OrderedDict

from perfsim.serving.request import Request


class Run:
    """Blocks that are cached, touched and evicted together; `key` is None for what nobody can ask for by content."""

    __slots__ = ("key", "refs", "resident")

    def __init__(self, key: int | None, resident: int) -> None:
        self.key = key
        self.resident = resident
        self.refs = 0


class KVCache:
    """The block pool of one replica. `free` counts blocks that can be allocated, cached ones included."""

    __slots__ = ("block_size", "blank", "caching", "free", "nodes", "queue", "tail", "total")

    def __init__(self, total: int, *, block_size: int, caching: bool) -> None:
        self.total = total
        self.free = total
        self.block_size = block_size
        self.caching = caching
        self.blank = total  # free blocks without content: they are always at the front of the queue
        self.queue: OrderedDict[Run, None] = OrderedDict()  # free blocks with content, next victim first
        self.tail: Run | None = None  # the anonymous run at the end of the queue, if there is one
        self.nodes: dict[int, Run] = {}

    def lookup(self, request: Request, limit: int) -> tuple[int, int]:
        """(blocks of `request` found in the cache, at most `limit`; free-queue blocks that taking them would use)."""
        hits = idle = start = 0
        if not self.caching:
            return 0, 0
        for key, end in zip(request.keys, request.ends, strict=True):
            node = self.nodes.get(key)
            if node is None:
                return hits, idle
            have = min(node.resident, end - start, limit - hits)
            hits += have
            if not node.refs:
                idle += have
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
            node = self.nodes[request.keys[index]]
            taken = min(left, node.resident, end - start)
            if not node.refs:
                del self.queue[node]
                self.tail = self.tail if self.queue else None
                self.free -= taken
                self.blank += node.resident - taken
                node.resident = taken
            node.refs += 1
            request.held.append(node)
            request.node_blocks += taken
            request.position += taken
            left -= taken
            if taken == end - start:
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
            run = next(iter(queue))
            if run.resident > count:
                run.resident -= count
                return
            count -= run.resident
            run.resident = 0
            queue.popitem(last=False)
            if run is self.tail:
                self.tail = None
            if run.key is not None:
                del self.nodes[run.key]

    def commit(self, request: Request, full_blocks: int) -> None:
        """Make the prompt's first `full_blocks` computed blocks findable under their keys."""
        keys, ends = request.keys, request.ends
        while request.node_index < len(ends):
            index = request.node_index
            start = ends[index - 1] if index else 0
            covered = min(full_blocks, ends[index])
            if covered <= request.position:
                return
            node = self.nodes.get(keys[index])
            mine = request.position - start
            holds = bool(request.held) and request.held[-1] is node
            if node is None and mine == 0:
                node = self.nodes[keys[index]] = Run(keys[index], 0)
                node.refs = 1
                request.held.append(node)
                holds = True
            if holds and node is not None and node.resident == mine:
                node.resident += covered - request.position
                request.node_blocks += covered - request.position
            request.position = covered
            if covered < ends[index]:
                return
            request.node_index = index + 1

    def release(self, request: Request, tokens: int, *, resumes: bool) -> None:
        """Free all blocks of a request that has slots for `tokens` tokens; a preempted one `resumes` later."""
        size = self.block_size
        full = tokens // size
        if self.caching and request.ends and request.ends[-1] > request.position:
            self.commit(request, full)  # keys that go on beyond the prompt: a later turn asks for what was generated
        private = -(-tokens // size) - request.node_blocks
        self.free += private
        if not self.caching:
            self.blank += private
        else:
            hashed = full - request.node_blocks
            self.blank += private - hashed
            if hashed:
                self._queue_private(request, hashed, keep=resumes and request.position == request.node_blocks)
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
        if any(node.refs for node in self.nodes.values()):
            return "a shared prefix is still referenced"
        return ""

    def _queue_private(self, request: Request, count: int, *, keep: bool) -> None:
        if not keep and self.tail is not None:
            self.tail.resident += count
            return
        run = Run(None, count)
        self.queue[run] = None
        if keep:
            request.run, request.run_start = run, request.node_blocks
            self.tail = None
        else:
            self.tail = run
