"""Long closed loops: fewer requests per client than were sent, of which the middle ones stand for those left out.

A loop begins with all prompts at once and ends with clients that run dry. Both count once, whatever the length, so
that the plain mean of a shorter loop is off: with four instead of ten requests per client the mean TTFT is up to twice
too high. Here the first and the last request of every client count once, and the ones between for all the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
STATISTICS = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
LATENCIES = ("ttft", "tpot", "e2e")


def weights(sent: NDArray[np.intp], *, clients: int, simulated: int, measured: int) -> Floats:
    """How many requests each of `simulated` per client stands for, by their order of sending; they sum to all.

    `measured` requests per client were sent. With two or fewer simulated there is no middle, and all count alike.
    """
    if simulated >= measured:
        return np.ones(len(sent))
    if simulated < 3:
        return np.full(len(sent), measured / simulated)
    middle = (sent >= clients) & (sent < clients * (simulated - 1))
    return np.where(middle, (measured - 2) / (simulated - 2), 1.0)


def metrics_of(requests: Mapping[str, Floats], weight: Floats, *, clients: int) -> dict[str, Any]:
    """The latencies and throughputs of `Result.metrics` when each request stands for `weight` of them.

    A client has one request in flight at all times until its last, so the loop lasts as long as a client's requests
    do one after the other, and until the slowest client is done.
    """
    found: dict[str, Any] = {name: _statistics(requests[f"{name}_s"], weight) for name in LATENCIES}
    duration = requests["arrival_s"] + requests["e2e_s"]
    left_out = float(((weight - 1.0) * requests["e2e_s"]).sum()) / clients
    makespan = float(duration.max() - requests["arrival_s"].min()) + left_out
    found["throughput"] = {
        "requests_per_s": float(weight.sum()) / makespan,
        "output_tokens_per_s": float((weight * requests["output_tokens"]).sum()) / makespan,
    }
    return found


def _statistics(values: Floats, weight: Floats) -> dict[str, float | None]:
    there = np.isfinite(values)
    values, weight = values[there], weight[there]
    if not len(values):
        return {"mean": None, **dict.fromkeys(STATISTICS)}
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    # As NumPy's linear quantile of every value repeated `weight` times.
    end = np.cumsum(weight)
    places = np.column_stack([end - weight, np.maximum(end - weight, end - 1.0)]).ravel()
    repeated = np.repeat(values, 2)
    return {
        "mean": float((values * weight).sum() / end[-1]),
        **{name: float(np.interp(level * (end[-1] - 1.0), places, repeated)) for name, level in STATISTICS.items()},
    }
