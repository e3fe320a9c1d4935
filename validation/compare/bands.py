"""Uncertainty bands of a result, relative to its values, so that they also serve statistics taken of its requests."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario

NONE = (float("nan"), float("nan"))


@dataclass(frozen=True, slots=True)
class Bands:
    """Per metric path (`ttft.mean`): the 90% band over the metric's value, as (low, high) factors around 1."""

    factors: dict[str, tuple[float, float]]

    def around(self, value: float, path: str) -> tuple[float, float]:
        """The band of a statistic close to the metric at `path`: (NaN, NaN) where the result has none."""
        factors = self.factors.get(path)
        return NONE if factors is None else (value * factors[0], value * factors[1])


def bands_of(scenario: Scenario, result: Result) -> Bands:
    """The 5-95% bands of a result: to first order, one factor moved alone and the rest together.

    Those of a closed loop need no run: no clock but the service's is in it, so all of its times follow the busy time.
    """
    from perfsim.run import quantify
    from perfsim.uncertainty.widen import is_closed

    if is_closed(scenario):
        return _of_loop(scenario, result)
    found = quantify(result, scenario, alone=1)
    factors = {}
    for path, (low, high) in found.bands.items():
        value = found.value(path)
        if value and low is not None and high is not None:
            factors[path] = (low / value, high / value)
    return Bands(factors)


def _of_loop(scenario: Scenario, result: Result) -> Bands:
    from perfsim.uncertainty.bands import spread_of_time
    from perfsim.uncertainty.spread import Z, headline
    from perfsim.uncertainty.widen import besides

    time, more = spread_of_time(scenario, result), besides(scenario, result)
    if not time:
        return Bands({})
    factors = {}
    for path in headline(result):
        if path.partition(".")[0] in ("ttft", "tpot", "itl", "e2e", "throughput"):
            down, up = (Z * math.hypot(time, size) for size in more.get(path, (0.0, 0.0)))
            factors[path] = (math.exp(-down), math.exp(up))
    return Bands(factors)
