"""Requests drawn from an arrival process and length distributions.

Arrivals, prompts, outputs and prefixes have a random stream each (PCG64 on spawned seeds), so changing one distribution
leaves the draws of the others as they were. Every draw consumes its stream element by element, and running sums carry
over, so the numbers do not depend on the chunk size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from perfsim.spec.distributions import FixedLength, GeometricLength, LognormalLength, UniformLength
from perfsim.spec.workload import SharedPrefix, SyntheticWorkload
from perfsim.traffic.arrivals import ArrivalClock
from perfsim.traffic.chunk import CHUNK_REQUESTS, MAX_TOKENS, Ints, RequestChunk

LengthSpec = FixedLength | UniformLength | LognormalLength | GeometricLength


class Streams(NamedTuple):
    """One independent random stream per thing that is drawn."""

    arrivals: np.random.Generator
    prompts: np.random.Generator
    outputs: np.random.Generator
    prefixes: np.random.Generator
    turns: np.random.Generator
    pauses: np.random.Generator
    documents: np.random.Generator
    choices: np.random.Generator
    adapters: np.random.Generator


def random_streams(seed: int) -> Streams:
    """The streams of `seed`, in a fixed order: a new one goes to the end, so that the others draw as before."""
    seeds = np.random.SeedSequence(seed).spawn(len(Streams._fields))
    return Streams(*(np.random.Generator(np.random.PCG64(s)) for s in seeds))


def draw_lengths(spec: LengthSpec, *, count: int, rng: np.random.Generator) -> Ints:
    """`count` lengths in tokens, int64, each from 1 to `MAX_TOKENS`.

    Lognormal: exp(mu + sigma*z) with mu = ln(mean) - sigma^2/2, the mean before rounding and clipping to [1, max].
    Geometric: number of trials with success probability 1/mean.
    """
    if isinstance(spec, FixedLength):
        return np.full(count, spec.tokens, dtype=np.int64)
    if isinstance(spec, UniformLength):
        return rng.integers(spec.low, spec.high, size=count, dtype=np.int64, endpoint=True)
    if isinstance(spec, GeometricLength):
        return np.minimum(rng.geometric(1.0 / spec.mean, size=count), MAX_TOKENS).astype(np.int64)
    mu = math.log(spec.mean) - spec.sigma**2 / 2
    lengths = np.exp(mu + spec.sigma * rng.standard_normal(count))
    return np.clip(np.rint(lengths), 1, spec.max).astype(np.int64)


def prefix_chooser(spec: SharedPrefix, *, rng: np.random.Generator) -> Callable[[int, int], Ints]:
    """A function (index of the first request, count) -> int64[count] prefix ids in [0, num_prefixes)."""
    if spec.order == "rotation":
        return lambda first, count: np.arange(first, first + count, dtype=np.int64) % spec.num_prefixes
    return lambda first, count: rng.integers(0, spec.num_prefixes, size=count, dtype=np.int64)


def synthetic_chunks(
    workload: SyntheticWorkload, *, seed: int, chunk_requests: int = CHUNK_REQUESTS
) -> Iterator[RequestChunk]:
    """The requests of `workload`, in chunks of `chunk_requests`; values do not depend on the chunk size.

    With a shared prefix each prompt holds at least the prefix, and `prefix_id`, `prefix_tokens` say what is shared.
    """
    streams = random_streams(seed)
    clock = ArrivalClock(workload.arrivals, rng=streams.arrivals)
    shared = workload.shared_prefix
    choose = None if shared is None else prefix_chooser(shared, rng=streams.prefixes)
    for first in range(0, workload.num_requests, chunk_requests):
        count = min(chunk_requests, workload.num_requests - first)
        prompt = draw_lengths(workload.prompt, count=count, rng=streams.prompts)
        prefix_id = prefix_tokens = None
        if shared is not None and choose is not None:
            prompt = np.maximum(prompt, shared.tokens)
            prefix_id = choose(first, count)
            prefix_tokens = np.full(count, shared.tokens, dtype=np.int64)
        yield RequestChunk(
            arrival_s=clock.take(count),
            prompt_tokens=prompt,
            output_tokens=draw_lengths(workload.output, count=count, rng=streams.outputs),
            prefix_id=prefix_id,
            prefix_tokens=prefix_tokens,
        )
