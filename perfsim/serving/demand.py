"""What a workload asks for on average, read from its first requests: the input of the closed form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError
from perfsim.serving.driver import of_adapter
from perfsim.spec.scenario import Scenario
from perfsim.spec.workload import ClosedLoop
from perfsim.traffic import (
    RequestChunk,
    SessionChunk,
    closed_loop_source,
    is_closed_loop,
    is_conversation,
    session_source,
    stream,
)
from perfsim.traffic.arrivals import mean_rate, peak_rate
from perfsim.traffic.stream import TracePath

SAMPLE = 1 << 17  # requests that are looked at: the mean of a lognormal with sigma 1 is then known to 0.4%


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """Arrays over the sampled requests: tokens of the prompt, of those found in the prefix cache, and of the output.

    `rate` is requests/s (None in a closed loop, which has `clients` and `think_time` instead), `peak` the rate at the
    busiest time where it varies. `notes` say what was simplified.
    """

    prompt: NDArray[np.float64]
    cached: NDArray[np.float64]
    output: NDArray[np.float64]
    rate: float | None
    clients: int = 0
    think_time: float = 0.0
    peak: float | None = None
    notes: tuple[str, ...] = ()


def demand_of(
    scenario: Scenario, *, trace_path: TracePath | None, max_model_len: int, block_size: int, pool_tokens: int
) -> Demand:
    """Look at the first `SAMPLE` requests of the scenario's workload; requests beyond `max_model_len` are left out.

    Of an arrival process whose rate varies, `rate` is the mean in the long run. Turns of sessions are taken to find all
    that was said before in the cache. Raises InputError when no request is left, when an open loop sends all of them at
    once, and for sessions in a closed loop, whose pauses depend on what they say.
    """
    workload, arrivals = scenario.workload, scenario.workload.arrivals
    closed = is_closed_loop(workload)
    notes: tuple[str, ...] = ()
    if is_conversation(workload):
        if closed:
            raise InputError("an estimate knows no sessions in a closed loop; use simulate for this workload")
        source = session_source(workload, seed=scenario.seed, max_context=max_model_len)
        table, span, events = _conversations(source.chunks, scenario)
        notes = ("turns are taken to find all that was said before in the prefix cache, whatever the KV pool holds",)
    else:
        table, span, events = _requests(scenario, trace_path=trace_path, pool_tokens=pool_tokens)
    per_event = table.shape[1] / events  # turns of a session; 1 for single requests
    table = table[:, table[0] + table[2] <= max_model_len]
    if not table.size:
        raise InputError(f"every request is longer than max_model_len ({max_model_len} tokens): nothing to estimate")
    if isinstance(arrivals, ClosedLoop):
        return Demand(
            table[0], table[1], table[2], rate=None, clients=arrivals.concurrency, think_time=arrivals.think_time
        )
    peak = None if arrivals is None else peak_rate(arrivals)
    rate = mean_rate(arrivals) if arrivals is not None and peak is not None else None
    if rate is None:
        if span <= 0.0:
            raise InputError(
                "an estimate needs requests at two different times or more; use simulate for this workload"
            )
        rate = (events - 1) / span
    most = None if peak is None else peak * per_event
    return Demand(table[0], table[1], table[2], rate=rate * per_event, peak=most, notes=notes)


def _requests(
    scenario: Scenario, *, trace_path: TracePath | None, pool_tokens: int
) -> tuple[NDArray[np.float64], float, int]:
    """((prompt, cached, output) rows by request, seconds between the first and the last, number of requests)."""
    workload, policy = scenario.workload, scenario.policy
    if is_closed_loop(workload):
        chunks = closed_loop_source(workload, seed=scenario.seed, trace_path=trace_path, lora=policy.lora).chunks
    else:
        chunks = stream(workload, seed=scenario.seed, trace_path=trace_path, lora=policy.lora)
    cache = _Cache(pool_tokens)
    parts: list[NDArray[np.float64]] = []
    first, last, count = None, 0.0, 0
    for whole in chunks:
        chunk = whole.head(SAMPLE - count)
        if first is None:
            first = float(chunk.arrival_s[0])
        last, count = float(chunk.arrival_s[-1]), count + len(chunk)
        cached = cache.found(chunk, policy.block_size) if policy.enable_prefix_caching else np.zeros(len(chunk))
        parts.append(np.stack([chunk.prompt_tokens, cached, chunk.output_tokens]).astype(np.float64))
        if count >= SAMPLE:
            break
    return np.concatenate(parts, axis=1), last - (first or 0.0), count


def _conversations(chunks: Iterator[SessionChunk], scenario: Scenario) -> tuple[NDArray[np.float64], float, int]:
    """As `_requests`, of turns, with the number of sessions."""
    size = scenario.policy.block_size
    parts: list[NDArray[np.float64]] = []
    starts: list[float] = []
    turns, met = 0, set[int]()
    for chunk in chunks:
        for index in range(len(chunk)):
            row, count = int(chunk.first[index]), int(chunk.turns[index])
            prompt, output = chunk.prompt_tokens[row : row + count], chunk.output_tokens[row : row + count]
            # What is in the cache: the system prompt, once somebody has sent it, then all but the last token said.
            prefix = -1 if chunk.prefix_id is None else int(chunk.prefix_id[index])
            known = np.concatenate(([chunk.prefix_tokens if prefix in met else 0], (prompt + output - 1)[:-1]))
            met.add(prefix)
            found = np.minimum(known // size, (prompt - 1) // size) * size
            cached = found if scenario.policy.enable_prefix_caching else np.zeros(count)
            parts.append(np.stack([prompt, cached, output]).astype(np.float64))
            starts.append(float(chunk.start_s[index]))
            turns += count
            if turns >= SAMPLE:
                return np.concatenate(parts, axis=1), starts[-1] - starts[0], len(starts)
    return np.concatenate(parts, axis=1), starts[-1] - starts[0], len(starts)


class _Cache:
    """The most recently used prompt pieces that fit the KV pool; what decoding holds of it is neglected."""

    def __init__(self, pool_tokens: int) -> None:
        self._pool_tokens = pool_tokens
        self._pieces: OrderedDict[int, int] = OrderedDict()  # key -> tokens
        self._held = 0

    def found(self, chunk: RequestChunk, block_size: int) -> NDArray[np.float64]:
        """Prompt tokens already held, per request; at least one is always computed."""
        count = len(chunk)
        adapters = [-1] * count if chunk.adapter is None else chunk.adapter.tolist()
        found = np.zeros(count)
        if chunk.segment_ids is not None and chunk.segment_ends is not None:
            for index, (keys, ends) in enumerate(zip(chunk.segment_ids, chunk.segment_ends, strict=True)):
                found[index] = self._leading(of_adapter(keys, adapters[index]), ends)
        elif chunk.hash_block_ids is not None:
            size = chunk.hash_block_tokens
            for index, ids in enumerate(chunk.hash_block_ids):
                names = of_adapter(ids or [], adapters[index])
                found[index] = self._leading(names, range(size, size * len(names) + 1, size))
        elif chunk.prefix_id is not None and chunk.prefix_tokens is not None:
            for index, (key, size) in enumerate(
                zip(chunk.prefix_id.tolist(), chunk.prefix_tokens.tolist(), strict=True)
            ):
                found[index] = self._leading(of_adapter([key], adapters[index]), [size])
        most = (chunk.prompt_tokens - 1) // block_size * block_size
        return np.minimum(found // block_size * block_size, most)

    def _leading(self, keys: Sequence[int], ends: Sequence[int]) -> int:
        """Where the leading pieces that are held end; all of them are, the first most firmly, afterwards."""
        hits = next((index for index, key in enumerate(keys) if key not in self._pieces), len(keys))
        for index in range(len(keys) - 1, -1, -1):
            tokens = ends[index] - (ends[index - 1] if index else 0)
            self._held += tokens - self._pieces.pop(keys[index], 0)
            self._pieces[keys[index]] = tokens
        while self._pieces and self._held > self._pool_tokens:
            self._held -= self._pieces.popitem(last=False)[1]
        return ends[hits - 1] if hits else 0
