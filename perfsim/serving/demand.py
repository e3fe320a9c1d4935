"""What a workload asks for on average, read from its first requests: the input of the closed form."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from perfsim.spec.scenario import Scenario
from perfsim.spec.workload import ClosedLoop
from perfsim.traffic import RequestChunk, closed_loop_source, is_closed_loop, stream
from perfsim.traffic.stream import TracePath

SAMPLE = 1 << 17  # requests that are looked at: the mean of a lognormal with sigma 1 is then known to 0.4%


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Arrays over the sampled requests: tokens of the prompt, of those found in the prefix cache, and of the output.

    `rate` is requests/s (None in a closed loop, which has `clients` and `think_time` instead).
    """

    prompt: NDArray[np.float64]
    cached: NDArray[np.float64]
    output: NDArray[np.float64]
    rate: float | None
    clients: int = 0
    think_time: float = 0.0


def demand_of(scenario: Scenario, *, trace_path: TracePath | None, max_model_len: int, pool_tokens: int) -> Demand:
    """Look at the first `SAMPLE` requests of the scenario's workload; requests beyond `max_model_len` are left out.

    Raises InputError when none is left, or when an open loop sends all of them at once.
    """
    workload, arrivals = scenario.workload, scenario.workload.arrivals
    closed = is_closed_loop(workload)
    if closed:
        chunks = closed_loop_source(workload, seed=scenario.seed, trace_path=trace_path).chunks
    else:
        chunks = stream(workload, seed=scenario.seed, trace_path=trace_path)
    caching = scenario.policy.enable_prefix_caching
    parts: list[NDArray[np.float64]] = []
    cache = _Cache(pool_tokens)
    first, last, count = None, 0.0, 0
    for whole in chunks:
        chunk = whole.head(SAMPLE - count)
        if first is None:
            first = float(chunk.arrival_s[0])
        last, count = float(chunk.arrival_s[-1]), count + len(chunk)
        cached = cache.found(chunk, scenario.policy.block_size) if caching else np.zeros(len(chunk))
        parts.append(np.stack([chunk.prompt_tokens, cached, chunk.output_tokens]).astype(np.float64))
        if count >= SAMPLE:
            break
    table = np.concatenate(parts, axis=1)
    table = table[:, table[0] + table[2] <= max_model_len]
    if not table.size:
        raise InputError(f"every request is longer than max_model_len ({max_model_len} tokens): nothing to estimate")
    span = last - (first or 0.0)
    if span <= 0.0 and not closed:
        raise InputError("an estimate needs requests at two different times or more; use simulate for this workload")
    rate = None if closed else (count - 1) / span
    clients, think = (arrivals.concurrency, arrivals.think_time) if isinstance(arrivals, ClosedLoop) else (0, 0.0)
    return Demand(table[0], table[1], table[2], rate=rate, clients=clients, think_time=think)


class _Cache:
    """The most recently used prompt pieces that fit the KV pool; what decoding holds of it is neglected."""

    def __init__(self, pool_tokens: int) -> None:
        self._pool_tokens = pool_tokens
        self._pieces: OrderedDict[int, None] = OrderedDict()

    def found(self, chunk: RequestChunk, block_size: int) -> NDArray[np.float64]:
        """Prompt tokens already held, per request; at least one is always computed."""
        found = np.zeros(len(chunk))
        if chunk.hash_block_ids is not None:
            size = chunk.hash_block_tokens
            for index, ids in enumerate(chunk.hash_block_ids):
                found[index] = self._leading(ids or [], size) * size
        elif chunk.prefix_id is not None and chunk.prefix_tokens is not None:
            for index, (key, size) in enumerate(
                zip(chunk.prefix_id.tolist(), chunk.prefix_tokens.tolist(), strict=True)
            ):
                found[index] = self._leading([key], size) * size
        most = (chunk.prompt_tokens - 1) // block_size * block_size
        return np.minimum(found // block_size * block_size, most)

    def _leading(self, keys: list[int], tokens: int) -> int:
        """How many leading keys are held; all of them are, the first most firmly, afterwards."""
        hits = next((index for index, key in enumerate(keys) if key not in self._pieces), len(keys))
        for key in reversed(keys):
            self._pieces[key] = None
            self._pieces.move_to_end(key)
        while self._pieces and len(self._pieces) * tokens > self._pool_tokens:
            self._pieces.popitem(last=False)
        return hits
