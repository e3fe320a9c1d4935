"""Arrival times of a load test in stages: exponential gaps, stretched to fill each stage exactly."""

from __future__ import annotations

import numpy as np

from perfsim.errors import InputError
from perfsim.spec.arrivals import StagedArrivals
from perfsim.traffic.chunk import Floats


class Stages:
    """Times of a staged process, any number at a time; every stage begins when the one before has ended.

    The n gaps of a stage are E_i * seconds / sum(E), E exponential: the arrivals of a Poisson process given that the
    n-th one comes at the end (Kingman, "Poisson Processes", 1993, 2.4, recalled).
    """

    def __init__(self, process: StagedArrivals, *, rng: np.random.Generator) -> None:
        self._process = process
        self._rng = rng
        self._stage = 0
        self._begin = 0.0
        self._ahead: Floats = np.empty(0)

    def take(self, count: int) -> Floats:
        """The next `count` times in seconds; InputError when the stages do not send as many requests."""
        parts: list[Floats] = []
        while count > 0:
            if not len(self._ahead):
                self._ahead = self._draw()
            parts.append(self._ahead[:count])
            self._ahead = self._ahead[count:]
            count -= len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0)

    def _draw(self) -> Floats:
        counts = self._process.counts
        if self._stage == len(counts):
            raise InputError(f"workload.num_requests: expected at most the {sum(counts)} requests of the stages")
        gaps = self._rng.standard_exponential(counts[self._stage])
        seconds = self._process.stages[self._stage][1]
        sums = np.cumsum(gaps)
        times: Floats = self._begin + seconds * (sums / sums[-1])
        self._stage += 1
        self._begin += seconds
        return times
