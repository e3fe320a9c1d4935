"""The unit of traffic: a few thousand requests as NumPy columns, so that a trace larger than memory streams."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

CHUNK_REQUESTS = 65_536
# Requests with block ids carry hundreds of Python integers each: smaller chunks keep the same memory bound.
HASHED_CHUNK_REQUESTS = 4_096

# Bounds that catch wrong units and wrong columns: no prompt is 1e8 tokens long, and beyond 1e9 s (31 years, or a Unix
# time stamp) a float64 no longer resolves a microsecond.
MAX_TOKENS = 10**8
MAX_ARRIVAL_S = 1e9

_COLUMNS = (
    "arrival_s", "prompt_tokens", "output_tokens", "priority", "hash_block_ids", "prefix_id", "prefix_tokens",
    "session_id", "adapter", "segment_ids", "segment_ends",
)  # fmt: skip

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class RequestChunk:
    """Consecutive requests of a stream, one array element per request, in order of arrival.

    arrival_s: float64[n], seconds from the start of the stream, non-decreasing; all zeros in a closed loop, where the
        simulator decides when a request is sent.
    prompt_tokens, output_tokens: int64[n], at least 1.
    priority: int64[n], lower is served first (vLLM's convention), or None when all are 0.
    session_id: int64[n], equal for the requests of one conversation, user or agent, -1 for none; None when all are.
    adapter: int64[n], which LoRA adapter, from 0, -1 for the base model; None when all are.

    What a prompt shares with earlier prompts comes in one of three forms, or not at all:

    hash_block_ids: per request, one integer for each `hash_block_tokens` tokens of the prompt (the last block may be
        partial), or None where unknown. Equal ids mean equal tokens *and* an equal prefix before them, so two prompts
        share their longest common run of leading ids. Recorded in traces.
    prefix_id, prefix_tokens: int64[n]: the first `prefix_tokens` tokens of the prompt are those of every other prompt
        with this `prefix_id`; everything after them is unique. Two numbers instead of a list of ids: the leanest form
        for synthetic shared prefixes, and independent of any block size, so the engine cuts it into its own blocks.
    segment_ids, segment_ends: per request, ids as in `hash_block_ids` of leading segments of any length, and the token
        of the prompt at which each ends. For retrieved documents, which all differ in length.
    """

    arrival_s: Floats
    prompt_tokens: Ints
    output_tokens: Ints
    priority: Ints | None = None
    hash_block_ids: list[list[int] | None] | None = None
    hash_block_tokens: int = 0
    prefix_id: Ints | None = None
    prefix_tokens: Ints | None = None
    session_id: Ints | None = None
    adapter: Ints | None = None
    segment_ids: list[list[int]] | None = None
    segment_ends: list[list[int]] | None = None

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    def head(self, count: int) -> RequestChunk:
        """The first `count` requests."""
        if count >= len(self):
            return self
        columns = {name: getattr(self, name) for name in _COLUMNS}
        cut: dict[str, Any] = {name: column[:count] for name, column in columns.items() if column is not None}
        return replace(self, **cut)

    def at(self, arrival_s: Floats) -> RequestChunk:
        """The same requests with other arrival times."""
        return replace(self, arrival_s=arrival_s)
