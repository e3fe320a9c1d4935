"""What an engine has decided to run: one step, or a run of equal decode steps, with or without its price."""

from __future__ import annotations

from typing import NamedTuple

from perfsim.serving.timing import TIME_EPS, run_seconds, steps_until

Sums = tuple[int, ...]


class Extras(NamedTuple):
    """Of a step with drafts or LoRA adapters, or of one in a pipeline: the last columns of a segment.

    `load` seconds pass before the step while adapters are copied to the GPU, `held` until the pipeline takes the next
    one.
    """

    accepted: int
    lora_tokens: int
    lora_adapters: int
    load: float
    held: float = 0.0

    @property
    def lora(self) -> tuple[int, int]:
        """(tokens with an adapter, distinct adapters)."""
        return self.lora_tokens, self.lora_adapters


class Work:
    """Steps in flight, then a segment of the recorder: step i of `count` lasts first + i * slope seconds.

    The scheduler sets the sums and the most steps that nothing else can change (`count`); the clock, an engine's own or
    that of a lock-step group, sets times. `waiting` requests were queued when it began; `group_tokens` are the new
    tokens of all data-parallel ranks. For the recorder: `running` requests have a slot, for `gaps` of the decodes
    a step is the time between two tokens, each puts out `emitted` tokens, and `kv_blocks` are in use at the end.
    `longest` is the longest context that a decode attends in the first step, `longest_prompt` that of a prompt chunk;
    0 where nobody keeps account of it.
    """

    first: float
    emitted: int
    gaps: int
    kv_blocks: int
    longest: int
    longest_prompt: int

    __slots__ = (
        "context", "count", "decodes", "emitted", "extras", "first", "gaps", "group_tokens", "growth", "kv_blocks",
        "logits", "longest", "longest_prompt", "pairs", "prefill", "read", "running", "slope", "start", "tokens",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, start: float, count: int, tokens: int, logits: int, decodes: int, prefill: int, context: Sums,
        growth: Sums, pairs: Sums, read: Sums, waiting: int, running: int,
    ) -> None:  # fmt: skip
        self.start = start
        self.count = count
        self.tokens = tokens
        self.logits = logits
        self.decodes = decodes
        self.prefill = prefill
        self.context = context
        self.growth = growth
        self.pairs = pairs
        self.read = read
        self.waiting = waiting
        self.running = running
        self.group_tokens = tokens
        self.slope = 0.0
        self.extras: Extras | None = None

    def end(self) -> float:
        """When the last step ends."""
        count = self.count
        if count == 1:
            return self.start + self.first
        return self.start + (count * self.first + self.slope * (count * (count - 1) / 2))  # run_seconds, without a call

    def last_start(self) -> float:
        """When the last step begins."""
        if self.count == 1:
            return self.start
        return self.start + run_seconds(self.count - 1, self.first, self.slope)

    def cut(self, at: float, *, ahead: int) -> None:
        """Keep the steps up to the first boundary not before `at`, and `ahead` more."""
        steps = 0
        if at - TIME_EPS > self.start:
            steps = steps_until(at - TIME_EPS, now=self.start, first=self.first, slope=self.slope, most=self.count)
        steps = steps + ahead or 1
        self.count = steps if steps < self.count else self.count
