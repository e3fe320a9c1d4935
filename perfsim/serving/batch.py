"""The decoding sequences of an engine as sums that advance by arithmetic instead of by loops over sequences."""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from perfsim.ops.step import FULL, Span
from perfsim.serving.adapters import AdapterCounts
from perfsim.serving.request import Request
from perfsim.serving.window import SpanSum, span_sum

SLACK = 64  # entries of sequences that have left, which a heap may keep whatever its size


class DecodeBatch:
    """Everything a run of decode steps depends on; `step` counts the engine's steps and is the clock of all of it.

    `tokens` are computed in step `step`, one for each of the `size` sequences, and `context` is the number of tokens
    attended in it, `longest` that of the longest of them (0: there is none), which stays it because all grow alike.
    A sequence with n computed tokens takes a new block in a step where n is a multiple of the block size:
    `block_phase[s % block_size]` counts the sequences that do so in step s.
    """

    accepted = 0  # draft tokens that the next step turns into output: there are none

    __slots__ = ("adapters", "block_phase", "block_size", "completions", "context", "longest", "size", "step",
                 "tokens", "windows", "window_sums", "_by_base")  # fmt: skip

    def __init__(self, *, block_size: int, windows: tuple[Span, ...]) -> None:
        self.step = 0
        self.size = 0
        self.tokens = 0
        self.context = self.longest = 0
        self.block_size = block_size
        self.block_phase = [0] * block_size
        self.completions: list[tuple[int, int, int, Request]] = []  # (last step, admission, stint, request)
        self._by_base: list[tuple[int, int, int, Request]] = []  # (-base, admission, stint, request)
        self.windows = windows
        self.adapters = AdapterCounts()
        self.window_sums: list[SpanSum] = [span_sum(span) for span in windows if span != FULL]

    def join(self, request: Request) -> None:
        """A sequence with all its tokens computed decodes from the next step on."""
        step = self.step
        request.base = request.computed - step
        request.decoding = True
        request.stint += 1
        request.finish_step = step + request.output - request.emitted - 1
        self.size += 1
        self.tokens += 1
        if request.adapter >= 0:
            self.adapters.join(request.adapter)
        attends = request.computed + 1
        self.context += attends
        self.longest = attends if attends > self.longest else self.longest
        self.block_phase[-request.base % self.block_size] += 1
        heappush(self.completions, (request.finish_step, request.order, request.stint, request))
        heappush(self._by_base, (-request.base, request.order, request.stint, request))
        if len(self._by_base) > 2 * self.size + SLACK:  # most of them have left
            self._by_base = [entry for entry in self._by_base if entry[3].decoding and entry[3].stint == entry[2]]
            heapify(self._by_base)
        for window in self.window_sums:
            window.join(request, step)

    def leave(self, request: Request) -> None:
        """A sequence does not take part in the next step; its own state is brought up to date."""
        step = self.step
        request.decoding = False
        request.computed = request.base + step
        request.emitted = request.output - (request.finish_step - step + 1)
        self.size -= 1
        self.tokens -= 1
        if request.adapter >= 0:
            self.adapters.leave(request.adapter)
        attends = request.computed + 1
        self.context -= attends
        if attends == self.longest:
            self.longest = self._next_longest()
        self.block_phase[-request.base % self.block_size] -= 1
        for window in self.window_sums:
            window.leave(request, step)

    def _next_longest(self) -> int:
        """The longest context attended in step `step`, once the longest sequence has left."""
        entries = self._by_base
        while entries:
            base, _, stint, request = entries[0]
            if request.decoding and request.stint == stint:
                return self.step - base + 1
            heappop(entries)
        return 0

    def computed(self, request: Request) -> int:
        """Computed tokens of a decoding sequence."""
        return request.base + self.step

    def held(self, request: Request) -> int:
        """K/V blocks of a decoding sequence before the next step."""
        return -(-(request.base + self.step) // self.block_size)

    def adapted_tokens(self) -> int:
        """Of the `tokens` those with a LoRA adapter."""
        return self.adapters.sequences

    def new_blocks(self) -> int:
        """Blocks that the next step takes."""
        return self.block_phase[self.step % self.block_size]

    def steps_left(self) -> int:
        """Steps from `step` on, in which nothing completes before the last one, no window fills and no chunk begins."""
        last, _, stint, request = self.completions[0]
        while not (request.decoding and request.stint == stint):
            heappop(self.completions)
            last, _, stint, request = self.completions[0]
        left = last - self.step + 1
        for window in self.window_sums:
            left = min(left, window.limit(self.step))
        return left

    def attended(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(attended tokens in step `step`, their growth per step), each per span."""
        if not self.window_sums:
            return (self.context,), (self.size,)
        attended, growth, sums = [], [], iter(self.window_sums)
        for span in self.windows:
            tracked = None if span == FULL else next(sums)
            attended.append(self.context if tracked is None else tracked.attended)
            growth.append(self.size if tracked is None else tracked.growth)
        return tuple(attended), tuple(growth)

    def blocks_in_run(self, count: int) -> int:
        """Blocks taken in the steps after `step` of a run of `count` steps."""
        size, phase = self.block_size, self.block_phase
        first = (self.step + 1) % size
        last = first + count - 1
        if last <= size:
            return sum(phase[first:last])
        rounds, rest = divmod(last, size)  # a round takes a block per sequence
        return (rounds - 1) * self.size + sum(phase[first:]) + sum(phase[:rest])

    def steps_with_blocks(self, free: int, limit: int) -> int:
        """How many steps, at most `limit`, `free` blocks last; those of the first step are already taken."""
        size, phase = self.block_size, self.block_phase
        rounds = free // self.size  # block_size steps take one block per sequence
        if limit - 2 < rounds * size:
            return limit
        count, left, step = 1 + rounds * size, free - rounds * self.size, self.step + 1 + rounds * size
        while count < limit and phase[step % size] <= left:
            left -= phase[step % size]
            count += 1
            step += 1
        return count

    def advance(self, count: int) -> None:
        """`count` steps have run."""
        self.step += count
        size = self.size
        if size:
            self.context += count * size
            self.longest += count
        for window in self.window_sums:
            window.advance(count, self.step)
