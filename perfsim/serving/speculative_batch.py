"""Decoding sequences that emit several tokens per step, as sums over calendars of what each step will bring.

How many drafts a sequence's verifications will accept is drawn when it joins, so its whole path (tokens, K/V blocks,
last step) is known at once and is added to calendars: arrays over future steps. A step then costs the same whatever
the number of sequences, and leaving takes the rest of the path out again.
"""

from __future__ import annotations

from heapq import heappush

import numpy as np
from numpy.typing import NDArray

from perfsim.ops.step import Span
from perfsim.serving.acceptance import Acceptance
from perfsim.serving.adapters import AdapterCounts
from perfsim.serving.request import Request

Ints = NDArray[np.int64]


class Path:
    """What a sequence does from step `start` on: before its i-th step it has `tokens[i]` computed tokens.

    `blocks[i]` are the K/V blocks it holds once that step is scheduled, `attended[span][i]` the tokens it attends.
    """

    __slots__ = ("attended", "blocks", "held", "start", "surplus", "tokens")

    def __init__(self, start: int, tokens: Ints, blocks: Ints, held: int, attended: list[Ints], surplus: int) -> None:
        self.start = start
        self.tokens = tokens
        self.blocks = blocks
        self.held = held  # blocks before the first step
        self.attended = attended
        self.surplus = surplus  # tokens accepted beyond the end of the request

    @property
    def steps(self) -> int:
        return len(self.blocks)


class Calendar:
    """A sum per future step."""

    __slots__ = ("_amounts", "_origin")

    def __init__(self) -> None:
        self._amounts = np.zeros(1024, dtype=np.int64)
        self._origin = 0

    def add(self, step: int, amounts: Ints, *, now: int) -> None:
        """Add `amounts` from `step` on; nobody asks for steps before `now` any more."""
        end = step + len(amounts) - self._origin
        if end > len(self._amounts):
            left = self._amounts[now - self._origin :]
            grown = np.zeros(2 * (step + len(amounts) - now) + 1024, dtype=np.int64)
            grown[: len(left)] = left[: len(grown)]
            self._amounts, self._origin = grown, now
            end = step + len(amounts) - now
        self._amounts[end - len(amounts) : end] += amounts

    def at(self, step: int) -> int:
        index = step - self._origin
        return int(self._amounts[index]) if index < len(self._amounts) else 0


class SpeculativeBatch:
    """Drives like `DecodeBatch`, one step at a time; each sequence verifies up to `drafts` tokens per step.

    `lookahead` more token positions have blocks reserved, for what the drafter writes. Neglected: vLLM stops reserving
    at max_model_len and cuts the drafts of a sequence that reaches it.
    """

    longest = 0  # nobody keeps account of which sequence is the longest, because they grow by different amounts

    __slots__ = ("_acceptance", "_attended", "_blocks", "_changes", "_cut", "_cut_adapted", "_growth", "adapters",
                 "block_size", "completions", "drafts", "lookahead", "size", "step", "tokens", "windows")  # fmt: skip

    def __init__(
        self, *, block_size: int, windows: tuple[Span, ...], acceptance: Acceptance, lookahead: int
    ) -> None:  # fmt: skip
        self.step = 0
        self.size = 0
        self.tokens = 0  # of the next step
        self.block_size = block_size
        self.windows = windows
        self.drafts = acceptance.drafts
        self.lookahead = lookahead
        self.completions: list[tuple[int, int, int, Request]] = []  # (last step, admission, stint, request)
        self._acceptance = acceptance
        self._growth = Calendar()  # tokens that a step puts out
        self._blocks = Calendar()  # blocks that a step takes
        self._attended = [0] * len(windows)
        self._changes = [Calendar() for _ in windows]  # of attended tokens, from a step to the next
        self.adapters = AdapterCounts()
        self._cut_adapted = 0  # those of `_cut` that belong to sequences with an adapter
        self._cut = 0  # drafts that the sequences of the next step must do without

    def join(self, request: Request, *, drafts: int | None = None) -> None:
        """A sequence decodes from the next step on; in that one it verifies `drafts` tokens (None: as many as all)."""
        path = self._path(request, self.drafts if drafts is None else drafts)
        request.path = path
        request.decoding = True
        request.stint += 1
        request.finish_step = self.step + path.steps - 1
        self.size += 1
        self.tokens += 1 + self.drafts
        if request.adapter >= 0:
            self.adapters.join(request.adapter)
        for index, attended in enumerate(path.attended):
            self._attended[index] += int(attended[0])
        self._enter(path, 0, 1)
        heappush(self.completions, (request.finish_step, request.order, request.stint, request))

    def leave(self, request: Request) -> None:
        """A sequence does not take part in the next step; its own state is brought up to date."""
        path = request.path
        if path is None:
            raise RuntimeError("the request does not decode")
        done = self.step - path.start
        self._enter(path, done, -1)
        for index, attended in enumerate(path.attended):
            self._attended[index] -= int(attended[done])
        if done == path.steps:
            self._acceptance.cut_off += path.surplus
        request.decoding = False
        request.emitted += int(path.tokens[done] - path.tokens[0])
        request.computed = int(path.tokens[done])
        request.blocks = int(path.blocks[done - 1]) if done else path.held
        request.rounds += done
        request.path = None
        self.size -= 1
        self.tokens -= 1 + self.drafts
        if request.adapter >= 0:
            self.adapters.leave(request.adapter)

    def shorten(self, request: Request, drafts: int) -> None:
        """A sequence verifies only `drafts` tokens in the next step."""
        self.leave(request)
        self.join(request, drafts=drafts)
        self.tokens -= self.drafts - drafts
        self._cut += self.drafts - drafts
        if request.adapter >= 0:
            self._cut_adapted += self.drafts - drafts

    def computed(self, request: Request) -> int:
        """Computed tokens of a decoding sequence."""
        path = request.path
        return request.computed if path is None else int(path.tokens[self.step - path.start])

    def held(self, request: Request) -> int:
        """K/V blocks of a decoding sequence before the next step."""
        path = request.path
        if path is None or self.step == path.start:
            return request.blocks if path is None else path.held
        return int(path.blocks[self.step - path.start - 1])

    def adapted_tokens(self) -> int:
        """Of the `tokens` those with a LoRA adapter."""
        return self.adapters.sequences * (1 + self.drafts) - self._cut_adapted

    def new_blocks(self) -> int:
        """Blocks that the next step takes when nobody's drafts are cut short."""
        return self._blocks.at(self.step)

    @property
    def accepted(self) -> int:
        """Draft tokens that the next step turns into output."""
        return self._growth.at(self.step) - self.size

    def steps_left(self) -> int:
        """One: every step emits another number of tokens."""
        return 1

    def steps_with_blocks(self, free: int, limit: int) -> int:
        """How many steps, at most `limit`, the blocks last; those of the first step are already taken."""
        return limit

    def attended(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(attended tokens in step `step`, their growth per step), each per span."""
        return tuple(self._attended), tuple(changes.at(self.step) for changes in self._changes)

    def blocks_in_run(self, count: int) -> int:
        """Blocks taken in the steps after `step` of a run of `count` steps."""
        return sum(self._blocks.at(self.step + offset) for offset in range(1, count))

    def advance(self, count: int) -> None:
        """`count` steps have run."""
        for _ in range(count):
            for index, changes in enumerate(self._changes):
                self._attended[index] += changes.at(self.step)
            self.step += 1
        self.tokens += self._cut
        self._cut = self._cut_adapted = 0

    def _enter(self, path: Path, done: int, sign: int) -> None:
        """Add what is left of `path` after `done` steps to the calendars, or take it out."""
        first, now = path.start + done, self.step
        if done < path.steps:
            self._growth.add(first, sign * np.diff(path.tokens[done:]), now=now)
            held = path.blocks[done - 1] if done else path.held
            self._blocks.add(first, sign * np.diff(path.blocks[done:], prepend=held), now=now)
            for changes, attended in zip(self._changes, path.attended, strict=True):
                changes.add(first, sign * np.diff(attended[done:]), now=now)

    def _path(self, request: Request, drafts: int) -> Path:
        left, known = request.output - request.emitted, request.rounds
        emitted = 1 + self._acceptance.accepted(request.index, known + left)[known:]
        emitted[0] = min(int(emitted[0]), 1 + drafts)
        total = np.cumsum(emitted)
        steps = int(np.searchsorted(total, left)) + 1
        tokens = np.concatenate(([0], total[:steps]))
        tokens[steps] = left  # what is accepted beyond the request's end is cut off
        tokens += request.computed
        slots = tokens[:steps] + (1 + self.drafts + self.lookahead)
        slots[0] -= self.drafts - drafts
        blocks = np.maximum(-(-slots // self.block_size), request.blocks)
        attended = [_attended(span, tokens) for span in self.windows]
        return Path(self.step, tokens, blocks, request.blocks, attended, int(total[steps - 1]) - left)


def _attended(span: Span, position: Ints) -> Ints:
    """`Span.attended` of many positions."""
    if span.kind == "full":
        return position + 1
    if span.kind == "chunk":
        return position % span.size + 1
    return np.minimum(position + 1, span.size)
