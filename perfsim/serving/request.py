"""One request on its way through an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.serving.kv_cache import Run
    from perfsim.serving.kv_tier import Passage
    from perfsim.serving.speculative_batch import Path


class Request:
    """What the client asked for, and what the engine has done about it so far. Times in seconds, lengths in tokens.

    `keys` and `ends` describe the shareable part of the prompt: key i stands for the engine blocks from ends[i-1] (0
    for the first) up to ends[i]. While decoding, the computed tokens are `base` + the engine's step counter, so that
    nothing has to be updated per step. `session` names the conversation and `adapter` the LoRA adapter, -1: none.
    """

    __slots__ = (
        "adapter", "arrival", "base", "beside", "blocks", "cached", "computed", "decoding", "emitted", "ends",
        "fetched", "finish", "finish_step", "first_token", "held", "index", "keys", "last_token", "loaded",
        "node_blocks", "node_index", "order", "output", "passage", "path", "position", "preemptions", "priority",
        "prompt", "queued", "received", "remote", "rounds", "run", "run_start", "scheduled", "session", "stint",
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
        self.remote = False  # its prompt was computed by another engine, which has emitted the first token
        self.received = -1.0  # when that engine got it
        self.fetched = 0  # prompt tokens whose K/V this engine gets from there
        self.stint = 0  # how many times it has joined the decodes; tells live heap entries from stale ones
        self.preemptions = 0
        self.reset()

    def reset(self) -> None:
        """As if no engine had seen it yet."""
        self.scheduled = -1.0
        self.first_token = -1.0
        self.last_token = -1.0
        self.finish = -1.0
        self.computed = 0  # tokens whose K/V exist, while not decoding
        self.emitted = 0  # output tokens produced
        self.cached = 0  # prompt tokens found in the prefix cache at the first admission
        self.loaded = 0  # those loaded from the KV tier then
        self.order = 0  # place in the engine's sequence of admissions
        self.decoding = False
        self.base = 0
        self.finish_step = -1
        self.rounds = 0  # verifications of drafts so far
        self.blocks = 0  # of its growing cache, drafts included; kept under speculative decoding, while not decoding
        self.path: Path | None = None  # what its verifications will bring, while decoding
        self.passage: Passage | None = None  # owned by the KV tier
        # KV bookkeeping, owned by KVCache
        self.beside = 0  # blocks for windows, chunks and states
        self.held: list[Run] = []
        self.node_blocks = 0  # blocks that belong to shared runs rather than to this request alone
        self.node_index = 0
        self.position = 0  # prompt blocks already offered for sharing
        self.run: Run | None = None  # what a preemption left in the cache
        self.run_start = 0

    def sequel(self, at: float) -> Request:
        """What a decoding engine gets of a request that another engine has prefilled."""
        other = Request(self.index, self.arrival, at, self.prompt, self.output, self.priority, self.keys, self.ends)
        other.session, other.adapter = self.session, self.adapter
        other.remote, other.received = True, self.queued
        other.scheduled, other.first_token, other.last_token = self.scheduled, self.first_token, self.first_token
        other.cached, other.emitted, other.preemptions = self.cached, 1, self.preemptions
        return other

    @property
    def target(self) -> int:
        """Tokens to compute before the next one can be sampled: the prompt and everything generated so far."""
        return self.prompt + self.emitted
