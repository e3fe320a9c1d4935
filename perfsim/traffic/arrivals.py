"""Arrival times, any number at a time.

Processes of constant rate add up gaps. Those whose rate varies are Poisson processes in another time: with unit
exponential gaps, the i-th arrival is at Lambda^-1(sum of the first i gaps), where Lambda(t) is the integral of the rate
(Cinlar, "Introduction to Stochastic Processes", 1975, ch. 4.7, recalled). Nothing is drawn and thrown away, as thinning
would, so the numbers do not depend on how many are asked for at a time.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from perfsim.errors import InputError
from perfsim.spec.arrivals import (
    BurstyArrivals,
    ClosedLoop,
    ConstantArrivals,
    CurveArrivals,
    DiurnalArrivals,
    GammaArrivals,
    OpenLoop,
    PoissonArrivals,
    QuantisedArrivals,
    StagedArrivals,
)
from perfsim.traffic.chunk import MAX_ARRIVAL_S, Floats
from perfsim.traffic.stages import Stages

Process = OpenLoop | ClosedLoop
_STATES = 256  # durations of a bursty process that are drawn at a time


class ArrivalClock:
    """Arrival times in order: `take(n)` gives the next n, float64[n] seconds from 0.

    Poisson: exponential gaps of mean 1/rate. Gamma: shape 1/cv^2, scale cv^2/rate, hence mean 1/rate and coefficient of
    variation cv. Quantised: Poisson, floor(t/quantum) * quantum. Diurnal, curve and bursty: see above. All of these
    start with a gap. Constant: i/rate from 0. Stages: one after the other without a pause. Closed loop: zeros. Raises
    InputError when a time exceeds `MAX_ARRIVAL_S`.
    """

    def __init__(self, process: Process, *, rng: np.random.Generator) -> None:
        self._process = process
        self._rng = rng
        self._count = 0
        self._sum = 0.0
        self._warp = _warp(process, rng)
        self._stages = Stages(process, rng=rng) if isinstance(process, StagedArrivals) else None

    def take(self, count: int) -> Floats:
        """The next `count` arrival times."""
        process = self._process
        if isinstance(process, ClosedLoop):
            return np.zeros(count)
        with np.errstate(over="ignore", invalid="ignore"):  # a rate near 0: an infinite time is reported below
            if self._stages is not None:
                times = self._stages.take(count)
            elif isinstance(process, ConstantArrivals):
                times = np.arange(self._count, self._count + count, dtype=np.float64) / process.rate
            else:
                times = self._running_sum(self._gaps(count))
                if self._warp is not None and count:
                    times = self._warp.times(times)
        if count and not times[-1] <= MAX_ARRIVAL_S:
            late = self._count + int(np.argmin(times <= MAX_ARRIVAL_S)) + 1
            raise InputError(
                f"workload.arrivals{_slow(process)}: request {late} would arrive after {MAX_ARRIVAL_S:g} s; "
                "expected a higher rate or a smaller num_requests"
            )
        self._count += count
        if isinstance(process, QuantisedArrivals):
            times = np.floor(times / process.quantum) * process.quantum
        return times

    def _gaps(self, count: int) -> Floats:
        process = self._process
        if isinstance(process, GammaArrivals):
            square = process.cv**2
            return self._rng.standard_gamma(1.0 / square, count) * (square / process.rate)
        gaps = self._rng.standard_exponential(count)
        return gaps / process.rate if isinstance(process, PoissonArrivals | QuantisedArrivals) else gaps

    def _running_sum(self, gaps: Floats) -> Floats:
        # Adding the carry to the first gap keeps the order of additions that one long cumsum would have.
        if not len(gaps):
            return gaps
        gaps[0] += self._sum
        sums = np.cumsum(gaps)
        self._sum = float(sums[-1])
        return sums


def mean_rate(process: Process) -> float | None:
    """Requests/s in the long run; None where there is no such number: a closed loop, a curve that does not repeat."""
    if isinstance(process, CurveArrivals):
        return None if process.period is None else float(_pieces(process).total / process.period)
    return None if isinstance(process, ClosedLoop) else process.rate


def peak_rate(process: Process) -> float | None:
    """The largest rate that a process with a varying rate lasts at; None for processes of constant rate."""
    if isinstance(process, DiurnalArrivals):
        return process.rate * (1.0 + process.amplitude)
    if isinstance(process, BurstyArrivals):
        return max(process.base_rate, process.burst_rate)
    if isinstance(process, StagedArrivals):
        return max(rate for rate, _ in process.stages)
    return max(rate for _, rate in process.points) if isinstance(process, CurveArrivals) else None


class _Warp(Protocol):
    """The inverse of the cumulated rate, for non-decreasing arguments."""

    def times(self, sums: Floats) -> Floats: ...


def _warp(process: Process, rng: np.random.Generator) -> _Warp | None:
    if isinstance(process, DiurnalArrivals):
        return _Sine(process)
    if isinstance(process, CurveArrivals):
        return _pieces(process)
    if isinstance(process, BurstyArrivals):
        return _Bursts(process, rng=rng.spawn(1)[0])
    return None


def _slow(process: Process) -> str:
    rate = getattr(process, "rate", None) if "rate" in type(process).model_fields else None
    return "" if rate is None else f".rate = {rate:g}/s"


class _Sine:
    """Lambda(t) = rate * (t + A P / 2 pi * (cos(2 pi phase / P) - cos(2 pi (t + phase) / P)))."""

    def __init__(self, process: DiurnalArrivals) -> None:
        self._rate = process.rate
        self._swing = process.amplitude * process.period / (2 * math.pi)
        self._turn = 2 * math.pi / process.period
        self._phase = process.phase * self._turn % (2 * math.pi)
        self._last = 0.0

    def times(self, sums: Floats) -> Floats:
        """Newton's steps, replaced by bisection where they leave the bracket (the rate may touch zero)."""
        wanted = sums / self._rate
        low, high = np.maximum(wanted - 2 * self._swing, 0.0), wanted + 2 * self._swing
        time = np.clip(wanted, low, high)
        moving = np.ones(len(sums), dtype=np.bool_)  # each stops on its own, whatever it was asked for with
        for _ in range(80):
            angle = self._turn * time + self._phase
            over = time + self._swing * (math.cos(self._phase) - np.cos(angle)) - wanted
            low, high = np.where(over < 0, time, low), np.where(over > 0, time, high)
            slope = 1.0 + self._swing * self._turn * np.sin(angle)
            step = time - over / np.where(slope > 1e-9, slope, 1e-9)
            inside = (step > low) & (step < high)
            following = np.where(over == 0, time, np.where(inside, step, (low + high) / 2))
            moved = np.abs(following - time)
            time = np.where(moving, following, time)
            moving &= moved > 1e-13 * np.maximum(time, 1.0)
            if not moving.any():
                break
        time[0] = max(time[0], self._last)
        time = np.maximum.accumulate(time)
        self._last = float(time[-1])
        return time


class _Pieces:
    """A rate that goes linearly from `first[i]` to `last[i]` between `start[i]` and the next start; the cumulated rate
    at `start[i]` is `below[i]`. With `period` it repeats, else the last piece is endless.
    """

    def __init__(
        self, start: Floats, length: Floats, first: Floats, last: Floats, *, origin: float = 0.0,
        period: float | None = None,
    ) -> None:  # fmt: skip
        self._start, self._length, self._first, self._last = start, length, first, last
        self._period = period
        finite = np.where(np.isinf(length), 0.0, length)
        self._below = origin + np.concatenate(([0.0], np.cumsum(finite * (first + last) / 2)))
        self.total = float(self._below[-1])

    def times(self, sums: Floats) -> Floats:
        """u with first u + (last - first) u^2 / 2 length = what is left of the sum inside its piece."""
        whole = np.zeros_like(sums)
        if self._period is not None:
            whole = np.floor(sums / self.total)
            sums = sums - whole * self.total
        # A sum at the very end of the last piece, by rounding, still belongs to it.
        index = np.minimum(np.searchsorted(self._below, sums, side="right") - 1, len(self._start) - 1)
        left = np.maximum(sums - self._below[index], 0.0)
        first = self._first[index]
        bend = (self._last - self._first) / self._length
        root = first + np.sqrt(np.maximum(first**2 + 2 * left * bend[index], 0.0))
        inside = np.minimum(2 * left / np.where(root > 0, root, 1.0), self._length[index])
        times = self._start[index] + inside
        return times if self._period is None else whole * self._period + times


def _pieces(process: CurveArrivals) -> _Pieces:
    start = np.array([time for time, _ in process.points])
    first = np.array([rate for _, rate in process.points], dtype=np.float64)
    end = math.inf if process.period is None else process.period
    length = np.diff(np.append(start, end))
    last = first
    if process.shape == "linear":
        last = np.append(first[1:], first[0] if process.period is not None else first[-1])
    return _Pieces(start, length, first, last, period=process.period)


class _Bursts:
    """The rate of a bursty process: states with exponential durations, drawn as time goes by."""

    def __init__(self, process: BurstyArrivals, *, rng: np.random.Generator) -> None:
        self._rates = process.base_rate, process.burst_rate
        self._means = process.base_duration, process.burst_duration
        self._rng = rng
        whole = process.base_duration + process.burst_duration
        self._state = int(rng.random() < process.burst_duration / whole)
        self._now = self._reached = 0.0
        self._ahead: list[_Pieces] = []

    def times(self, sums: Floats) -> Floats:
        parts = []
        while len(sums):
            if not self._ahead or self._reached <= sums[0]:
                self._ahead = [self._draw()]
            inside = int(np.searchsorted(sums, self._reached, side="left"))
            parts.append(self._ahead[0].times(sums[:inside]))
            sums = sums[inside:]
            if self._now > 2 * MAX_ARRIVAL_S:  # the caller reports what is beyond the limit
                parts.append(np.full(len(sums), math.inf))
                break
        return np.concatenate(parts)

    def _draw(self) -> _Pieces:
        states = (self._state + np.arange(_STATES)) % 2
        self._state = int(states[-1]) ^ 1
        length = self._rng.standard_exponential(_STATES) * np.take(self._means, states)
        start = self._now + np.concatenate(([0.0], np.cumsum(length)))
        rates = np.take(self._rates, states).astype(np.float64)
        pieces = _Pieces(start[:-1], length, rates, rates, origin=self._reached)
        self._now, self._reached = float(start[-1]), pieces.total
        return pieces
