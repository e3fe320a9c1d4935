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

from perfsim.errors import InputError
from perfsim.spec.workload import (
    ClosedLoop,
    ConstantArrivals,
    FixedLength,
    GammaArrivals,
    GeometricLength,
    LognormalLength,
    PoissonArrivals,
    QuantisedArrivals,
    SharedPrefix,
    SyntheticWorkload,
    UniformLength,
)
from perfsim.traffic.chunk import CHUNK_REQUESTS, MAX_ARRIVAL_S, MAX_TOKENS, Floats, Ints, RequestChunk

Process = PoissonArrivals | GammaArrivals | ConstantArrivals | QuantisedArrivals | ClosedLoop
LengthSpec = FixedLength | UniformLength | LognormalLength | GeometricLength


class Streams(NamedTuple):
    """One independent random stream per thing that is drawn."""

    arrivals: np.random.Generator
    prompts: np.random.Generator
    outputs: np.random.Generator
    prefixes: np.random.Generator


def random_streams(seed: int) -> Streams:
    """The four streams of `seed`, in a fixed order."""
    return Streams(*(np.random.Generator(np.random.PCG64(s)) for s in np.random.SeedSequence(seed).spawn(4)))


class ArrivalClock:
    """Arrival times in order, any number at a time: `take(n)` gives the next n, float64[n] seconds from 0.

    Poisson: exponential gaps of mean 1/rate. Gamma: shape 1/cv^2, scale cv^2/rate, hence mean 1/rate and coefficient of
    variation cv. Quantised: Poisson, floor(t/quantum) * quantum. All three start with a gap. Constant: i/rate from 0.
    Closed loop: zeros. Raises InputError when a time exceeds `MAX_ARRIVAL_S`.
    """

    def __init__(self, process: Process, *, rng: np.random.Generator) -> None:
        self._process = process
        self._rng = rng
        self._count = 0
        self._now = 0.0

    def take(self, count: int) -> Floats:
        """The next `count` arrival times."""
        process = self._process
        if isinstance(process, ClosedLoop):
            return np.zeros(count)
        if isinstance(process, ConstantArrivals):
            with np.errstate(over="ignore"):
                times = np.arange(self._count, self._count + count, dtype=np.float64) / process.rate
        else:
            times = self._running_sum(_gaps(process, count=count, rng=self._rng))
        if count and not times[-1] <= MAX_ARRIVAL_S:
            late = self._count + int(np.argmin(times <= MAX_ARRIVAL_S)) + 1
            raise InputError(
                f"workload.arrivals.rate = {process.rate:g}/s: request {late} would arrive after {MAX_ARRIVAL_S:g} s; "
                "expected a higher rate or a smaller num_requests"
            )
        self._count += count
        if isinstance(process, QuantisedArrivals):
            times = np.floor(times / process.quantum) * process.quantum
        return times

    def _running_sum(self, gaps: Floats) -> Floats:
        # Adding the carry to the first gap keeps the order of additions that one long cumsum would have.
        if not len(gaps):
            return gaps
        gaps[0] += self._now
        times = np.cumsum(gaps)
        self._now = float(times[-1])
        return times


def _gaps(
    process: PoissonArrivals | GammaArrivals | QuantisedArrivals, *, count: int, rng: np.random.Generator
) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):  # a rate near 0: the caller reports the infinite time
        if isinstance(process, GammaArrivals):
            square = process.cv**2
            return rng.standard_gamma(1.0 / square, count) * (square / process.rate)
        return rng.standard_exponential(count) / process.rate


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
