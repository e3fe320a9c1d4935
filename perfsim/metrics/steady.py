"""The closed form's answer in the shape of a simulated one: means where there are means, nothing elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from perfsim.metrics.aggregate import Aggregated
from perfsim.metrics.definitions import LATENCIES, STATISTICS
from perfsim.metrics.summary import GroupUse, Outcome
from perfsim.units import HOUR

if TYPE_CHECKING:
    from perfsim.serving.closed_form import SteadyState
    from perfsim.spec.policy import SLO


def steady_outcome(steady: SteadyState, slo: SLO, group: GroupUse) -> Outcome:
    """One hour of the steady state; percentiles, breakdown and energy are what only a simulation knows."""
    known = {"ttft": steady.ttft, "engine_ttft": steady.engine_ttft, "tpot": steady.tpot, "e2e": steady.e2e}
    latencies = {name: {stat: known.get(name) if stat == "mean" else None for stat in STATISTICS} for name in LATENCIES}
    served = min(steady.rate, steady.max_rate)
    requests = round(served * HOUR)
    counts = {
        "requests": requests,
        "completed": requests,
        "rejected": 0,
        "failed": 0,
        "prompt_tokens": round(served * HOUR * steady.prompt_tokens),
        "output_tokens": round(served * HOUR * steady.output_tokens),
        "cached_tokens": round(served * HOUR * steady.cached_tokens),
        "preemptions": 0,
    }
    metrics: dict[str, Any] = {
        **latencies,
        "makespan_s": HOUR,
        "throughput": {
            "requests_per_s": served,
            "output_tokens_per_s": served * steady.output_tokens,
            "prompt_tokens_per_s": served * steady.prompt_tokens,
            "total_tokens_per_s": served * (steady.prompt_tokens + steady.output_tokens),
            "max_requests_per_s": steady.max_rate,
        },
        "load": steady.load,
        "counts": counts,
        "prefix_cache": {"hit_rate": steady.cached_tokens / steady.prompt_tokens},
        "goodput": {"requests": None, "fraction": None, "requests_per_s": None},
        "slo": _verdicts(known, slo),
        "batch": {"mean_sequences": steady.sequences},
    }
    notes = ["closed form of the steady state: means only, see `perfsim simulate` for percentiles and energy"]
    if steady.e2e is None:
        notes.insert(
            0,
            f"unstable: {steady.rate:.3g} requests/s arrive, at most {steady.max_rate:.3g} can be served; queues grow",
        )
    elif not steady.in_range:
        notes.append(
            "outside the range the closed form was tested in (load, prompt length): simulate before trusting it"
        )
    notes.extend(steady.notes)
    simulation = {"requests": 0, "steps": 0, "segments": 0}
    aggregated = Aggregated(
        metrics=metrics, curves={}, timeline={}, simulation=simulation, makespan_s=HOUR, littles_law=None
    )
    return Outcome(aggregated, (group,), notes=tuple(notes))


def _verdicts(known: dict[str, float | None], slo: SLO) -> dict[str, Any]:
    """Bounds on means are judged, all others are unknown to the closed form."""
    verdicts = []
    for name in ("ttft", "tpot", "itl", "e2e"):
        for stat, bound in getattr(slo, name).items():
            measured = known.get(name) if stat == "mean" else None
            holds = None if measured is None else measured <= bound
            verdicts.append({"metric": name, "stat": stat, "bound_s": bound, "measured_s": measured, "holds": holds})
    judged = [verdict["holds"] for verdict in verdicts if verdict["holds"] is not None]
    return {"holds": False if False in judged else None, "verdicts": verdicts}
