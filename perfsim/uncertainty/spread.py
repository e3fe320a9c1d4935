"""From reruns to a band per metric: in quadrature for the first order, quantiles for draws."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

from perfsim.metrics.definitions import HEADLINE, metric

if TYPE_CHECKING:
    from perfsim.metrics.result import Result

Values = Mapping[str, float | None]
Band = list[float | None]

TAIL = 0.05  # outside the band on either side
Z = NormalDist().inv_cdf(1.0 - TAIL)


@dataclass(frozen=True, slots=True)
class Scale:
    """How changes of a metric are measured: in its logarithm, or as they are where it may be zero or is a fraction."""

    base: float
    logarithmic: bool
    largest: float

    def change(self, value: float | None) -> float:
        """The change from the base; infinite where the rerun has no value, because it is unstable."""
        if value is None:
            return math.inf
        return math.log(value / self.base) if self.logarithmic else value - self.base

    def moved(self, point: float, change: float) -> float | None:
        """The point prediction after a change; None for one without limit."""
        if math.isinf(change):
            return None
        if self.logarithmic:
            return point * math.exp(change)
        return min(self.largest, max(0.0, point + change))


def headline(result: Result) -> dict[str, float | None]:
    """The values that get a band, by path; those the run has not are left out."""
    numbers = result.numbers()
    return {path: numbers[path] for path in HEADLINE if numbers.get(path) is not None}


def scale_of(path: str, base: float, others: Sequence[Values]) -> Scale:
    """Logarithmic unless the metric is a fraction or is zero somewhere."""
    fraction = metric(path).unit == "fraction"
    found = [values.get(path) for values in others]
    positive = base > 0 and all(value is None or value > 0 for value in found)
    largest = 1.0 if fraction and path != "load" else math.inf
    return Scale(base, positive and not fraction, max(largest, base))


def in_quadrature(point: Values, base: Values, pairs: Sequence[tuple[Values, Values]]) -> dict[str, Band]:
    """First order: of each independent factor, values with it at its 95% and at its 5% quantile.

    A side of the band is the root of the summed squares of the largest change of each factor to that side, so the band
    contains the point and is as skewed as the reruns are.
    """
    bands: dict[str, Band] = {}
    runs = [values for pair in pairs for values in pair]
    for path, value in point.items():
        start = base.get(path)
        if value is None or start is None:
            continue
        scale = scale_of(path, start, runs)
        changes = [(scale.change(slow.get(path)), scale.change(fast.get(path))) for slow, fast in pairs]
        up = math.sqrt(sum(max(0.0, *change) ** 2 for change in changes))
        down = math.sqrt(sum(min(0.0, *change) ** 2 for change in changes))
        bands[path] = [scale.moved(value, -down), scale.moved(value, up)]
    return bands


def of_draws(point: Values, base: Values, draws: Sequence[Values]) -> dict[str, Band]:
    """Monte Carlo: 5% and 95% quantiles of the changes, each the next draw outwards; the point is always inside."""
    bands: dict[str, Band] = {}
    for path, value in point.items():
        start = base.get(path)
        if value is None or start is None:
            continue
        scale = scale_of(path, start, draws)
        changes = np.array([scale.change(values.get(path)) for values in draws])
        low = min(0.0, float(np.quantile(changes, TAIL, method="lower")))
        high = max(0.0, float(np.quantile(changes, 1.0 - TAIL, method="higher")))
        bands[path] = [scale.moved(value, low), scale.moved(value, high)]
    return bands


def with_power(values: Values, result: Result, logarithm: float) -> dict[str, float | None]:
    """The values when energy above idle is off by a factor: nothing but energy changes, so no rerun is needed."""
    total, dynamic = result.energy.get("joules"), result.energy.get("gpu_dynamic_joules")
    if not total or dynamic is None:
        return dict(values)
    ratio = (total + dynamic * math.expm1(logarithm)) / total
    return {path: value if value is None or not path.startswith("energy.") else value * ratio
            for path, value in values.items()}  # fmt: skip
