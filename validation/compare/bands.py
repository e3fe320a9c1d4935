"""Uncertainty bands of a result, relative to its values, so that they also serve statistics taken of its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

NONE = (float("nan"), float("nan"))


@dataclass(frozen=True, slots=True)
class Bands:
    """Per metric path (`ttft.mean`): the 90% band over the metric's value, as (low, high) factors around 1."""

    factors: dict[str, tuple[float, float]]

    def around(self, value: float, path: str) -> tuple[float, float]:
        """The band of a statistic close to the metric at `path`: (NaN, NaN) where the result has none."""
        factors = self.factors.get(path)
        return NONE if factors is None else (value * factors[0], value * factors[1])


def bands_of(result: Result) -> Bands:
    """The bands of a result: its field `bands`, path -> [low, high]; none of a result without that field."""
    found = getattr(result, "bands", None) or {}
    factors = {}
    for path, band in found.items():
        value = result.value(path)
        if value and None not in band:  # no upper end: unstable
            factors[path] = (band[0] / value, band[1] / value)
    return Bands(factors)
