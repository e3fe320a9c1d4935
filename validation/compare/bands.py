"""Uncertainty bands of a result, relative to its values, so that they also serve statistics taken of its requests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario

NONE = (float("nan"), float("nan"))
# Requests of a closed loop from which its bands are computed: two per client, within these bounds.
FEWEST, MOST = 100, 400


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

    Those of a closed loop are computed on its beginning, with all factors moved together along the gradient of the busy
    time, and laid over the whole run: a table has thousands of loops, and in a sample of 49 of them no end of the bands
    of mean TPOT and TTFT moved by more than 0.07 of the value.
    """
    from perfsim.run import quantify, simulate

    short = _beginning(scenario)
    base = result if short is scenario else simulate(short)
    found = quantify(base, short, alone=0 if _closed(scenario) else 1)
    factors = {}
    for path, (low, high) in found.bands.items():
        value = found.value(path)
        if value and low is not None and high is not None:
            factors[path] = (low / value, high / value)
    return Bands(factors)


def _closed(scenario: Scenario) -> bool:
    return scenario.workload.arrivals is not None and scenario.workload.arrivals.kind == "closed"


def _beginning(scenario: Scenario) -> Scenario:
    from perfsim.spec.workload import ClosedLoop, SyntheticWorkload

    workload = scenario.workload
    if not isinstance(workload, SyntheticWorkload) or not isinstance(workload.arrivals, ClosedLoop):
        return scenario
    count = max(FEWEST, min(MOST, 2 * workload.arrivals.concurrency))
    if count >= workload.num_requests:
        return scenario
    return scenario.model_copy(update={"workload": workload.model_copy(update={"num_requests": count})})
