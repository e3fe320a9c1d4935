"""One request on its way through an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.serving.kv_cache import Run


class Request:
    """What the client asked for, and what the engine has done about it so far. Times in seconds, lengths in tokens.

    `keys` and `ends` describe the shareable part of the prompt: key i stands for the engine blocks from ends[i-1] (0
    for the first) up to ends[i]. While decoding, the computed tokens are `base` + the engine's step counter, so that
    nothing has to be updated per step. `session` names the conversation and `adapter` the LoRA adapter, -1: none.
    """

    __slots__ = (
        "adapter", "arrival", "base", "cached", "computed", "decoding", "emitted", "ends", "finish", "finish_step",
        "first_token", "held", "index", "keys", "last_token", "node_blocks", "node_index", "order", "output",
        "position", "preemptions", "priority", "prompt", "queued", "run", "run_start", "scheduled", "session", "stint",
    )  # fmt: skip

    def __init__(
        self, index: int, arrival: float, queued: float, prompt: int, output: int,
        priority: int = 0, keys: Sequence[int] = (), ends: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self.index = index
        self.arrival = arrival
        self.queued = queued
        self.prompt = prompt
        self.output = output
        self.priority = priority
        self.keys = keys
        self.ends = ends
        self.session = -1
        self.adapter = -1
        self.scheduled = -1.0
        self.first_token = -1.0
        self.last_token = -1.0
        self.finish = -1.0
        self.computed = 0  # tokens whose K/V exist, while not decoding
        self.emitted = 0  # output tokens produced
        self.cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.preemptions = 0
        self.order = 0  # place in the engine's sequence of admissions
        self.decoding = False
        self.stint = 0  # how many times it has joined the decodes; tells live heap entries from stale ones
        self.base = 0
        self.finish_step = -1
        # KV bookkeeping, owned by KVCache
        self.held: list[Run] = []
        self.node_blocks = 0  # blocks that belong to shared runs rather than to this request alone
        self.node_index = 0
        self.position = 0  # prompt blocks already offered for sharing
        self.run: Run | None = None  # what a preemption left in the cache
        self.run_start = 0

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled: the prompt and everything generated so far."""
        return self.prompt + self.emitted
