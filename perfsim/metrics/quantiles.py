"""Percentiles of a weighted multiset, exact as NumPy's linear ones while it is small, in logarithmic bins when not.

A `Distribution` is filled by chunks. Up to `limit` distinct pairs (value, weight) it keeps them and its percentiles
equal `np.percentile` of the multiset written out. Beyond that it counts in fixed bins 0.1% wide, answers with a bin's
geometric mean and so errs by at most 0.05%; memory is then constant.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Durations from 1 ns to 1e9 s (31 years); shorter ones count as the smallest value seen, longer ones as the largest.
BIN_RATIO = 1.001
SMALLEST_S, LARGEST_S = 1e-9, 1e9
_LOG_RATIO = math.log(BIN_RATIO)
_LOG_SMALLEST = math.log(SMALLEST_S)
_BINS = math.ceil((math.log(LARGEST_S) - _LOG_SMALLEST) / _LOG_RATIO) + 2


def bin_index(values: Floats) -> Ints:
    """The logarithmic bin of each value in seconds: 0 is everything below 1 ns, the last everything above 1e9 s."""
    with np.errstate(divide="ignore", invalid="ignore"):
        position = (np.log(values) - _LOG_SMALLEST) / _LOG_RATIO
    position = np.where(values < SMALLEST_S, -1.0, np.minimum(position, _BINS - 2.0))
    return np.floor(position).astype(np.int64) + 1


class Distribution:
    """A growing multiset of durations in seconds, with its mean, percentiles and maximum.

    `limit` is the number of stored pairs (value, weight) beyond which equal values are merged and, if that does not
    halve them, logarithmic bins take over.
    """

    def __init__(self, *, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._values: list[Floats] = []
        self._weights: list[Ints] = []
        self._stored = 0
        self._merged = False
        self._bins: Ints | None = None
        self._sum = 0.0
        self._least, self._most = math.inf, -math.inf

    @property
    def binned(self) -> bool:
        """True once percentiles come from logarithmic bins."""
        return self._bins is not None

    def add(self, values: Floats, weights: Ints | None = None) -> None:
        """Add `values`, each as often as its weight says (positive integers; None: once)."""
        if values.size == 0:
            return
        if weights is None:
            weights = np.ones(values.size, dtype=np.int64)
        self.count += int(weights.sum())
        self._least = min(self._least, float(values.min()))
        self._most = max(self._most, float(values.max()))
        if self._bins is not None:
            self._count(self._bins, values, weights)
            return
        self._values.append(values)
        self._weights.append(weights)
        self._stored += values.size
        self._merged = False
        if self._stored > self._limit:
            self._shrink()

    def summary(self) -> dict[str, float | None]:
        """Mean, p50, p90, p95, p99 and maximum in seconds; all None when there is no value."""
        if self.count == 0:
            return dict.fromkeys(("mean", "p50", "p90", "p95", "p99", "max"))
        p50, p90, p95, p99 = self.quantiles(np.array([0.5, 0.9, 0.95, 0.99])).tolist()
        return {"mean": self._mean(), "p50": p50, "p90": p90, "p95": p95, "p99": p99, "max": self._most}

    def quantiles(self, probabilities: Floats) -> Floats:
        """The values at `probabilities` in [0, 1], interpolated between neighbours as `np.percentile` does.

        Raises ValueError on an empty distribution.
        """
        if self.count == 0:
            raise ValueError("no values, so no percentiles")
        values, cumulative = self._ordered()
        # The order and the form of these operations are NumPy's (_lerp), so that the result is equal to the last bit.
        position = probabilities * (self.count - 1)
        below = np.floor(position)
        part = position - below
        lower_rank = below.astype(np.int64)
        upper_rank = np.minimum(lower_rank + 1, self.count - 1)
        lower = values[np.searchsorted(cumulative, lower_rank, side="right")]
        upper = values[np.searchsorted(cumulative, upper_rank, side="right")]
        step = upper - lower
        between: Floats = np.where(part >= 0.5, upper - step * (1.0 - part), lower + step * part)
        return between

    def _mean(self) -> float:
        if self._bins is not None:
            return self._sum / self.count
        self._merge()
        return float((self._values[0] * self._weights[0]).sum()) / self.count

    def _ordered(self) -> tuple[Floats, Ints]:
        """Distinct values in rising order and how many samples are at or below each."""
        if self._bins is None:
            self._merge()
            return self._values[0], np.cumsum(self._weights[0])
        filled = np.flatnonzero(self._bins)
        centres = np.exp(_LOG_SMALLEST + (filled - 0.5) * _LOG_RATIO)
        centres[filled == 0] = self._least
        centres[filled == _BINS - 1] = self._most
        return np.clip(centres, self._least, self._most), np.cumsum(self._bins[filled])

    def _merge(self) -> None:
        """Sort the stored pairs and add up the weights of equal values."""
        if self._merged:
            return
        values, weights = np.concatenate(self._values), np.concatenate(self._weights)
        order = np.argsort(values)
        values, weights = values[order], weights[order]
        first = np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))
        if first.size < values.size:
            values, weights = values[first], np.add.reduceat(weights, first)
        self._values, self._weights, self._stored = [values], [weights], values.size
        self._merged = True

    def _shrink(self) -> None:
        self._merge()
        if 2 * self._stored <= self._limit:
            return
        bins = np.zeros(_BINS, dtype=np.int64)
        self._count(bins, self._values[0], self._weights[0])
        self._values, self._weights, self._bins = [], [], bins

    def _count(self, bins: Ints, values: Floats, weights: Ints) -> None:
        # Weights pass through float64 inside bincount: exact below 2**53 tokens per chunk.
        bins += np.bincount(bin_index(values), weights=weights, minlength=_BINS).astype(np.int64)
        self._sum += float((values * weights).sum())
