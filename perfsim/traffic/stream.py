"""From a workload to the requests the simulator is fed with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TypeGuard

from perfsim.errors import InputError
from perfsim.spec.policy import LoraServing
from perfsim.spec.workload import (
    AgentsWorkload,
    ClosedLoop,
    RagWorkload,
    SessionsWorkload,
    SyntheticWorkload,
    TraceWorkload,
    Workload,
)
from perfsim.traffic.arrivals import ArrivalClock
from perfsim.traffic.choice import with_adapters
from perfsim.traffic.chunk import MAX_ARRIVAL_S, RequestChunk
from perfsim.traffic.rag import rag_chunks
from perfsim.traffic.readers import read_trace
from perfsim.traffic.synthetic import random_streams, synthetic_chunks

TracePath = Callable[[str], Path]


@dataclass(frozen=True, slots=True, eq=False)
class ClosedLoopSource:
    """Requests without arrival times (`arrival_s` is zero) and the clients that send them.

    `concurrency` clients send one request each at time 0; a client sends the next request of `chunks` `think_time_s`
    seconds after its last one was answered.
    """

    chunks: Iterator[RequestChunk]
    concurrency: int
    think_time_s: float


def is_closed_loop(workload: Workload) -> bool:
    """Whether requests are sent when others complete, not at given times."""
    return isinstance(workload.arrivals, ClosedLoop)


def is_conversation(workload: Workload) -> TypeGuard[SessionsWorkload | AgentsWorkload]:
    """Whether requests are turns of sessions, of which only the first is sent at a given time: see `session_source`."""
    return isinstance(workload, SessionsWorkload | AgentsWorkload)


def stream(
    workload: Workload, *, seed: int, trace_path: TracePath | None = None, lora: LoraServing | None = None
) -> Iterator[RequestChunk]:
    """The requests of an open-loop workload with non-decreasing arrival times, in chunks of at most 65,536.

    `trace_path` finds the file of a trace's name; without it the name is a path. With `lora` each request has an
    adapter. Synthetic values depend on the workload, `lora` and `seed` only. A trace's first chunk is read before this
    returns, so most bad files fail here; the rest is read as it is asked for. Raises InputError for a bad trace and an
    arrival beyond `MAX_ARRIVAL_S`, ValueError for a closed loop and for conversations, which have no arrival times.
    """
    if is_closed_loop(workload):
        raise ValueError("a closed loop has no arrival times; use closed_loop_source")
    return _chunks(workload, seed=seed, trace_path=trace_path, lora=lora)


def closed_loop_source(
    workload: Workload, *, seed: int, trace_path: TracePath | None = None, lora: LoraServing | None = None
) -> ClosedLoopSource:
    """The requests and clients of a closed-loop workload; arguments and errors as for `stream`.

    Raises ValueError for an open-loop workload.
    """
    arrivals = workload.arrivals
    if not isinstance(arrivals, ClosedLoop):
        raise ValueError("an open-loop workload has arrival times; use stream")
    chunks = _chunks(workload, seed=seed, trace_path=trace_path, lora=lora)
    return ClosedLoopSource(chunks, arrivals.concurrency, arrivals.think_time)


def _chunks(
    workload: Workload, *, seed: int, trace_path: TracePath | None, lora: LoraServing | None
) -> Iterator[RequestChunk]:
    if isinstance(workload, TraceWorkload):
        path = Path(workload.trace) if trace_path is None else trace_path(workload.trace)
        recorded = _recorded(workload, path)
        chunks = recorded if workload.arrivals is None else _rearrived(recorded, workload, seed=seed)
        chunks = chain([next(chunks)], chunks)
    elif isinstance(workload, RagWorkload):
        chunks = rag_chunks(workload, seed=seed)
    elif isinstance(workload, SyntheticWorkload):
        chunks = synthetic_chunks(workload, seed=seed)
    else:
        raise ValueError("the turns of a session follow its answers; use session_source")
    return with_adapters(chunks, lora, rng=random_streams(seed).adapters)


def _recorded(workload: TraceWorkload, path: Path) -> Iterator[RequestChunk]:
    left = math.inf if workload.num_requests is None else workload.num_requests
    for chunk in read_trace(path, need_arrivals=workload.arrivals is None, benchmark=workload.benchmark):
        kept = chunk if left >= len(chunk) else chunk.head(int(left))
        yield kept if workload.time_scale == 1.0 else _stretched(kept, workload.time_scale)
        left -= len(kept)
        if not left:
            return


def _stretched(chunk: RequestChunk, scale: float) -> RequestChunk:
    arrival = chunk.arrival_s * scale
    if arrival[-1] > MAX_ARRIVAL_S:
        raise InputError(
            f"workload.time_scale = {scale:g} stretches the trace to {arrival[-1]:g} s; "
            f"expected at most {MAX_ARRIVAL_S:g} s"
        )
    return chunk.at(arrival)


def _rearrived(chunks: Iterator[RequestChunk], workload: TraceWorkload, *, seed: int) -> Iterator[RequestChunk]:
    if workload.arrivals is None:
        return
    clock = ArrivalClock(workload.arrivals, rng=random_streams(seed).arrivals)
    for chunk in chunks:
        yield chunk.at(clock.take(len(chunk)))
