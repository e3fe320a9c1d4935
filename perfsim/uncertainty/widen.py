"""What no factor on times stands for: clients of a closed loop that queue for their first token, and rare stalls.

Their sizes are read off whole runs that were compared, for statistics of latencies as they are, so they are laid over
the bands that the factors give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from perfsim.uncertainty.spread import Z

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario
    from perfsim.uncertainty.spread import Band

TAIL_STATISTICS = ("p99", "max")


def besides(scenario: Scenario, result: Result) -> dict[str, tuple[float, float]]:
    """Standard deviations of the logarithm (downwards, upwards) by path of a metric, to be added in quadrature.

    In a closed loop, E2E and throughput follow TTFT by its share of E2E.
    """
    spreads = scenario.calibration.uncertainty
    if spreads is None:
        return {}
    found: dict[str, tuple[float, float]] = {}
    if spreads.closed_loop is not None and is_closed(scenario):
        shorter, longer = spreads.closed_loop.shorter, spreads.closed_loop.longer
        for path, part in _shares_of_first_token(result).items():
            found[path] = (part * shorter, part * longer) if part >= 0 else (-part * longer, -part * shorter)
    for name, tail in spreads.tails.items():
        for path in (f"{name}.{statistic}" for statistic in TAIL_STATISTICS):
            down, up = found.get(path, (0.0, 0.0))
            found[path] = (math.hypot(down, tail.sigma), math.hypot(up, tail.sigma))
    return {path: sizes for path, sizes in found.items() if max(sizes) > 0}


def is_closed(scenario: Scenario) -> bool:
    """Whether clients wait for an answer before they send the next request."""
    arrivals = scenario.workload.arrivals
    return arrivals is not None and arrivals.kind == "closed"


def _shares_of_first_token(result: Result) -> dict[str, float]:
    """d ln(metric) / d ln(TTFT), by path, at a given time per token."""
    numbers = result.numbers()
    found = {path: 1.0 for path in numbers if path.partition(".")[0] in ("ttft", "engine_ttft", "queue_time")}
    first, whole = numbers.get("ttft.mean"), numbers.get("e2e.mean")
    share = first / whole if first and whole else 0.0
    for path in numbers:
        if path.startswith("e2e.") or path == "makespan_s":
            found[path] = share
        elif path.startswith("throughput."):
            found[path] = -share
    return found


def widened(band: Band, point: float, sizes: tuple[float, float]) -> Band:
    """The band with a further independent spread: sides add in quadrature, in the logarithm. None stays open."""
    low, high = band
    if point <= 0:
        return band
    down = math.hypot(math.log(point / low), Z * sizes[0]) if low else None
    up = math.hypot(math.log(high / point), Z * sizes[1]) if high is not None else None
    return [low if down is None else point * math.exp(-down), None if up is None else point * math.exp(up)]


def with_besides(bands: Mapping[str, Band], result: Result, scenario: Scenario) -> dict[str, Band]:
    """All bands, those of `besides` widened."""
    numbers, sigmas = result.numbers(), besides(scenario, result)
    return {path: widened(band, numbers[path] or 0.0, sigmas[path]) if path in sigmas else band
            for path, band in bands.items()}  # fmt: skip
