"""Conversations and agents: sessions whose turns repeat all that was said before.

Everything but the time of the later turns is drawn here: those follow the answers, which the simulator knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from perfsim.spec.distributions import (
    ExponentialTime,
    FixedTime,
    FixedTurns,
    GeometricTurns,
    LognormalTime,
    UniformTime,
    UniformTurns,
)
from perfsim.spec.policy import LoraServing
from perfsim.spec.workload import AgentsWorkload, ClosedLoop, SessionsWorkload
from perfsim.traffic.arrivals import ArrivalClock
from perfsim.traffic.choice import zipf_chooser
from perfsim.traffic.chunk import Floats, Ints
from perfsim.traffic.synthetic import Streams, draw_lengths, prefix_chooser, random_streams

CHUNK_SESSIONS, CHUNK_TURNS = 4_096, 65_536  # about as many turns as a chunk of single requests
MAX_TURNS = 10_000

Conversation = SessionsWorkload | AgentsWorkload
TurnSpec = FixedTurns | UniformTurns | GeometricTurns
TimeSpec = FixedTime | UniformTime | ExponentialTime | LognormalTime


@dataclass(frozen=True, slots=True, eq=False)
class SessionChunk:
    """Consecutive sessions: int64[n] or float64[n] per session, and flat columns per turn, session after session.

    start_s: seconds from the start of the stream, non-decreasing; zeros in a closed loop.
    turns: how many of a session's turns fit its context; those of session i are rows first[i] to first[i] + turns[i].
    prefix_id, prefix_tokens: the system prompt (see `RequestChunk`), or None and 0.
    adapter: which LoRA adapter serves the session, or None.
    prompt_tokens: the whole prompt of the turn: system prompt, earlier turns with their answers, and what is new.
    output_tokens, pause_s: the answer, and seconds from there to the next turn.
    cut: bool[n], whether the context limit took turns from a session.
    """

    start_s: Floats
    turns: Ints
    first: Ints
    prefix_id: Ints | None
    prefix_tokens: int
    adapter: Ints | None
    prompt_tokens: Ints
    output_tokens: Ints
    pause_s: Floats
    cut: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.turns)


@dataclass(frozen=True, slots=True, eq=False)
class SessionSource:
    """Sessions in order; `concurrency` users with `think_time_s` between two sessions in a closed loop, else None."""

    chunks: Iterator[SessionChunk]
    concurrency: int | None = None
    think_time_s: float = 0.0


def session_source(
    workload: Conversation, *, seed: int, max_context: int, lora: LoraServing | None = None
) -> SessionSource:
    """The sessions of `workload`, their turns cut at `max_context` tokens (prompt and output) or at its own limit."""
    if workload.max_context is not None:
        max_context = min(max_context, workload.max_context)
    chunks = session_chunks(workload, seed=seed, max_context=max_context, lora=lora)
    arrivals = workload.arrivals
    if isinstance(arrivals, ClosedLoop):
        return SessionSource(chunks, arrivals.concurrency, arrivals.think_time)
    return SessionSource(chunks)


def session_chunks(
    workload: Conversation, *, seed: int, max_context: int, lora: LoraServing | None = None,
    chunk_sessions: int | None = None,
) -> Iterator[SessionChunk]:  # fmt: skip
    """Sessions in chunks; values do not depend on the chunk size. The first turn of a session is never cut."""
    streams = random_streams(seed)
    clock = ArrivalClock(workload.arrivals, rng=streams.arrivals)
    system = workload.system_prompt
    choose = None if system is None else prefix_chooser(system, rng=streams.prefixes)
    adapters = None
    if lora is not None:
        adapters = zipf_chooser(lora.num_adapters, exponent=lora.popularity, rng=streams.adapters)
    lead = 0 if system is None else system.tokens
    turn_law = workload.calls if isinstance(workload, AgentsWorkload) else workload.turns
    if chunk_sessions is None:
        chunk_sessions = max(1, min(CHUNK_SESSIONS, int(CHUNK_TURNS / _mean_turns(turn_law))))
    for number in range(0, workload.num_sessions, chunk_sessions):
        count = min(chunk_sessions, workload.num_sessions - number)
        drawn = draw_turns(turn_law, count=count, rng=streams.turns)
        first = np.concatenate(([0], np.cumsum(drawn)[:-1]))
        added, output, pause = _turns(workload, first, int(drawn.sum()), streams)
        said = np.cumsum(added + output)
        before = np.repeat(said[first] - added[first] - output[first], drawn)
        prompt = lead + said - before - output
        fits = np.add.reduceat((prompt + output <= max_context).astype(np.int64), first)
        turns = np.maximum(fits, 1)
        yield SessionChunk(
            start_s=clock.take(count),
            turns=turns,
            first=first,
            prefix_id=None if choose is None else choose(number, count),
            prefix_tokens=lead,
            adapter=None if adapters is None else adapters(count),
            prompt_tokens=prompt,
            output_tokens=output,
            pause_s=pause,
            cut=turns < drawn,
        )


def _turns(workload: Conversation, first: Ints, total: int, streams: Streams) -> tuple[Ints, Ints, Floats]:
    """(new prompt tokens, output tokens, seconds to the next turn) of `total` turns; sessions begin at `first`."""
    if isinstance(workload, AgentsWorkload):
        opening, later, wait = workload.task, workload.tool_output, workload.tool_latency
    else:
        opening, later, wait = workload.first_input or workload.input, workload.input, workload.think_time
    added = draw_lengths(later, count=total, rng=streams.prompts)
    if opening is not later:
        added[first] = draw_lengths(opening, count=len(first), rng=streams.choices)
    output = draw_lengths(workload.output, count=total, rng=streams.outputs)
    return added, output, draw_times(wait, count=total, rng=streams.pauses)


def draw_turns(spec: TurnSpec, *, count: int, rng: np.random.Generator) -> Ints:
    """`count` numbers of turns, int64, from 1 to `MAX_TURNS`."""
    if isinstance(spec, FixedTurns):
        return np.full(count, spec.turns, dtype=np.int64)
    if isinstance(spec, UniformTurns):
        return rng.integers(spec.low, spec.high, size=count, dtype=np.int64, endpoint=True)
    return np.minimum(rng.geometric(1.0 / spec.mean, size=count), MAX_TURNS).astype(np.int64)


def _mean_turns(spec: TurnSpec) -> float:
    if isinstance(spec, FixedTurns):
        return spec.turns
    return (spec.low + spec.high) / 2 if isinstance(spec, UniformTurns) else spec.mean


def draw_times(spec: TimeSpec, *, count: int, rng: np.random.Generator) -> Floats:
    """`count` durations in seconds. Lognormal: as lengths are drawn, the mean before clipping."""
    if isinstance(spec, FixedTime):
        return np.full(count, spec.seconds)
    if isinstance(spec, UniformTime):
        return spec.low + (spec.high - spec.low) * rng.random(count)
    if isinstance(spec, ExponentialTime):
        return rng.standard_exponential(count) * spec.mean
    mu = math.log(spec.mean) - spec.sigma**2 / 2
    return np.minimum(np.exp(mu + spec.sigma * rng.standard_normal(count)), spec.max)
