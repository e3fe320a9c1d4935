"""Arithmetic on segments: runs of equal-batch engine steps whose i-th step lasts first_s + i * slope_s."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from perfsim.metrics.quantiles import Distribution, Floats, Ints, bin_index

if TYPE_CHECKING:
    from collections.abc import Mapping

# Steps written out at once: bounds the memory of one chunk however long its segments are.
_BLOCK = 1 << 16


def durations(segments: Mapping[str, Any]) -> Floats:
    """Seconds each segment lasts: the sum of its affine step times."""
    steps = np.asarray(segments["steps"], dtype=np.float64)
    total: Floats = steps * segments["first_s"] + np.asarray(segments["slope_s"]) * (steps * (steps - 1.0) * 0.5)
    return total


def longest_step(segments: Mapping[str, Any]) -> float:
    """The longest single step of a chunk in seconds, 0 for no segments."""
    first = np.asarray(segments["first_s"])
    last = first + (np.asarray(segments["steps"]) - 1) * np.asarray(segments["slope_s"])
    return float(np.maximum(first, last).max(initial=0.0))


def add_gaps(gaps: Distribution, segments: Mapping[str, Any]) -> None:
    """Add the inter-token gaps of a chunk: step i gives `gap_sequences` gaps as long as the step.

    Once `gaps` counts in bins, a segment whose first and last step share a bin is added whole, at its mean.
    """
    sequences = np.asarray(segments["gap_sequences"], dtype=np.int64)
    some = np.flatnonzero(sequences)
    sequences = sequences[some]
    steps = np.asarray(segments["steps"], dtype=np.int64)[some]
    first = np.asarray(segments["first_s"], dtype=np.float64)[some]
    slope = np.asarray(segments["slope_s"], dtype=np.float64)[some]
    flat = (steps == 1) | (slope == 0.0)
    if gaps.binned and first.size:
        flat |= bin_index(first) == bin_index(first + (steps - 1) * slope)
    whole = first[flat] + slope[flat] * ((steps[flat] - 1) * 0.5)
    gaps.add(whole, sequences[flat] * steps[flat])
    varying = ~flat
    for values, weights in _written_out(steps[varying], first[varying], slope[varying], sequences[varying]):
        gaps.add(values, weights)


def _written_out(steps: Ints, first: Floats, slope: Floats, sequences: Ints) -> Iterator[tuple[Floats, Ints]]:
    """Every step's length and weight, in blocks of at most `_BLOCK` steps; a long segment may span blocks."""
    ends = np.cumsum(steps)
    begins = ends - steps
    total = int(ends[-1]) if ends.size else 0
    for low in range(0, total, _BLOCK):
        high = min(low + _BLOCK, total)
        part = slice(int(np.searchsorted(ends, low, side="right")), int(np.searchsorted(ends, high)) + 1)
        repeats = np.minimum(ends[part], high) - np.maximum(begins[part], low)
        index = np.arange(low, high) - np.repeat(begins[part], repeats)
        lengths = np.repeat(first[part], repeats) + index * np.repeat(slope[part], repeats)
        yield lengths, np.repeat(sequences[part], repeats)
