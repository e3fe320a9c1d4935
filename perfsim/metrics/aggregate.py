"""Folds the simulator's records into metrics chunk by chunk; nothing grows with the run beyond fixed limits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from perfsim.metrics.definitions import LATENCIES, PER_REQUEST, STATISTICS
from perfsim.metrics.quantiles import Distribution, Floats, Ints
from perfsim.metrics.timeline import Timeline, merged
from perfsim.metrics.usage import SERIES, Usage, mean_batch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from perfsim.spec.policy import SLO

    Columns = Mapping[str, Any]

# Distinct step lengths kept before ITL percentiles go to logarithmic bins: 16 bytes each, about ten per request.
PAIR_LIMIT = 2_000_000
_SUMS = ("prompt_tokens", "output_tokens", "cached_tokens", "preemptions")
# Even steps of 0.5% and a finer tail: what a CDF plot shows.
CURVE_PROBABILITIES: tuple[float, ...] = (*(i / 200 for i in range(199)), 0.992, 0.994, 0.996, 0.998, 0.999, 1.0)


@dataclass(frozen=True, slots=True)
class LittlesLaw:
    """Mean number of requests in the engine, measured twice: by segments over time, by requests as rate x time.

    `request_seconds` is the sum of (finish - queued), which `from_requests` divides by the span from first arrival to
    last finish. A segment counts requests once, at its start: one that arrives or ends during a step is off by a part
    of that step, so the two agree within `step_share`, the longest step per request over the span.
    """

    from_segments: float
    from_requests: float
    request_seconds: float
    step_share: float

    def holds(self, *, steps: float = 2.0, tolerance: float = 1e-6) -> bool:
        """Whether the two agree within `steps` steps per request and a relative `tolerance`."""
        margin = steps * self.step_share + tolerance * max(1.0, self.from_requests)
        return abs(self.from_requests - self.from_segments) <= margin


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What `Aggregate.finish` returns, each part a field of `Result`; `makespan_s` is None without requests."""

    metrics: dict[str, Any]
    curves: dict[str, Any]
    timeline: dict[str, Any]
    simulation: dict[str, int]
    makespan_s: float | None
    littles_law: LittlesLaw | None


class Aggregate:
    """Streaming totals, percentiles, timeline and verdicts of one run, of one scheduler or many.

    `egress` is seconds from a token in the engine to the client; `kv_blocks` and `block_size` (tokens) are the pool of
    a single scheduler, whose segments come through `add_segments`; others are added with `usage`. Percentiles are exact
    up to `exact_limit` requests (`pair_limit` distinct step lengths for ITL), within 0.05% beyond.
    """

    def __init__(self, *, slo: SLO, egress: float, kv_blocks: int | None = None, block_size: int = 1,
                 exact_limit: int = 1_000_000, pair_limit: int = PAIR_LIMIT) -> None:  # fmt: skip
        self._bounds: dict[str, dict[str, float]] = {
            name: dict(getattr(slo, name)) for name in ("ttft", "tpot", "itl", "e2e") if getattr(slo, name)
        }
        self._tightest = {name: min(self._bounds[name].values()) for name in PER_REQUEST if name in self._bounds}
        self._egress = egress
        self._latency = {name: Distribution(limit=exact_limit) for name in LATENCIES}
        self._latency["itl"] = Distribution(limit=pair_limit)
        self._usages: list[Usage] = []
        self._begin_s: float | None = None
        self._timeline = Timeline(SERIES)
        self._completed = self._good = self._failed = 0
        self._rejected: dict[str, int] = {}
        self._sums = dict.fromkeys(_SUMS, 0)
        self._longest = 0
        self.first_arrival, self.last_finish = math.inf, -math.inf
        self._engine_time = 0.0
        if kv_blocks is not None:
            self.usage(kv_blocks=kv_blocks, block_size=block_size)

    def usage(self, *, kv_blocks: int, block_size: int) -> Usage:
        """A sink for the segments of one more scheduler."""
        self._usages.append(Usage(kv_blocks=kv_blocks, block_size=block_size, itl=self._latency["itl"]))
        if self._begin_s is not None:
            self._usages[-1].timeline.begin(self._begin_s)
        return self._usages[-1]

    def begin(self, at_s: float) -> None:
        """Let all timelines start at a time in seconds, so that they can be added up; before the first segment."""
        self._begin_s = at_s
        for usage in self._usages:
            usage.timeline.begin(at_s)

    def add_requests(self, columns: Columns) -> None:
        """Add completed requests: the columns of the simulator's request records, times in seconds."""
        arrival, queued, scheduled, first, finish = (
            np.asarray(columns[name], dtype=np.float64)
            for name in ("arrival_s", "queued_s", "scheduled_s", "first_token_s", "finish_s")
        )
        if arrival.size == 0:
            return
        output = np.asarray(columns["output_tokens"], dtype=np.int64)
        ttft, e2e = first + self._egress - arrival, finish + self._egress - arrival
        tpot = time_per_output_token(first, finish, output)
        several = output > 1
        for name, values in (("ttft", ttft), ("engine_ttft", first - queued), ("e2e", e2e),
                             ("queue_time", scheduled - queued), ("tpot", tpot[several])):  # fmt: skip
            self._latency[name].add(values)
        self._good += self._count_good(ttft=ttft, tpot=np.where(several, tpot, 0.0), e2e=e2e)
        self._completed += arrival.size
        for name in _SUMS:
            self._sums[name] += int(np.sum(columns[name], dtype=np.int64))
        self._longest = max(self._longest, int((np.asarray(columns["prompt_tokens"]) + output).max()))
        self.first_arrival = min(self.first_arrival, float(arrival.min()))
        self.last_finish = max(self.last_finish, float(finish.max()))
        self._engine_time += float((finish - queued).sum())

    def add_rejected(self, reasons: Mapping[str, int]) -> None:
        """Count requests that the engine refused, by reason; they are not good and have no latency."""
        for reason, count in reasons.items():
            self._rejected[reason] = self._rejected.get(reason, 0) + count

    def add_failed(self, count: int) -> None:
        """Count requests that were given up after failures of replicas."""
        self._failed += count

    def add_gaps(self, seconds: Floats, weights: Ints) -> None:
        """Add inter-token gaps that are not one step long, such as the one a preemption causes."""
        self._latency["itl"].add(np.asarray(seconds, dtype=np.float64), np.asarray(weights, dtype=np.int64))

    def add_segments(self, columns: Columns) -> None:
        """Add the next segments of the first scheduler in order of time."""
        self._usages[0].add_segments(columns)

    def finish(self) -> Aggregated:
        """All metrics of what was added so far; a value that does not exist is None."""
        makespan = self.last_finish + self._egress - self.first_arrival if self._completed else None
        self._timeline = merged([usage.timeline for usage in self._usages])
        latencies = {name: self._latency[name].summary() for name in LATENCIES}
        metrics = {
            **latencies,
            "makespan_s": makespan,
            "throughput": self._throughput(makespan),
            "goodput": self._goodput(makespan),
            "slo": self._verdicts(latencies),
            "counts": {"requests": self._requests(), "completed": self._completed,
                       "rejected": sum(self._rejected.values()), "failed": self._failed, **self._sums,
                       "longest_context": self._longest},
            "rejected_for": dict(self._rejected),
            "prefix_cache": {"hit_rate": _ratio(self._sums["cached_tokens"], self._sums["prompt_tokens"])},
            **self._occupancy(),
            "percentile_method": {name: "0.1% logarithmic bins" if self._latency[name].binned else "exact"
                                  for name in LATENCIES},
        }  # fmt: skip
        simulation = {"requests": self._requests(), "steps": sum(usage.steps for usage in self._usages),
                      "segments": sum(usage.segments for usage in self._usages)}  # fmt: skip
        return Aggregated(metrics, self._curves(), self._series(), simulation, makespan, self._littles_law())

    def _requests(self) -> int:
        return self._completed + sum(self._rejected.values()) + self._failed

    def _count_good(self, **latencies: Floats) -> int:
        good = np.ones(latencies["e2e"].size, dtype=bool)
        for name, bound in self._tightest.items():
            good &= latencies[name] <= bound
        return int(good.sum())

    def _throughput(self, makespan: float | None) -> dict[str, float | None]:
        prompt, output = self._sums["prompt_tokens"], self._sums["output_tokens"]
        return {
            "requests_per_s": _ratio(self._completed, makespan),
            "output_tokens_per_s": _ratio(output, makespan),
            "prompt_tokens_per_s": _ratio(prompt, makespan),
            "total_tokens_per_s": _ratio(prompt + output, makespan),
        }

    def _goodput(self, makespan: float | None) -> dict[str, float | int | None]:
        if not self._tightest:
            return {"requests": None, "fraction": None, "requests_per_s": None}
        fraction = _ratio(self._good, self._requests())
        return {"requests": self._good, "fraction": fraction, "requests_per_s": _ratio(self._good, makespan)}

    def _verdicts(self, latencies: dict[str, dict[str, float | None]]) -> dict[str, Any]:
        verdicts = []
        for name, bounds in self._bounds.items():
            for stat in (stat for stat in STATISTICS if stat in bounds):
                measured = latencies[name][stat]
                holds = None if measured is None else measured <= bounds[stat]
                verdicts.append({"metric": name, "stat": stat, "bound_s": bounds[stat], "measured_s": measured,
                                 "holds": holds})  # fmt: skip
        known = [verdict["holds"] for verdict in verdicts if verdict["holds"] is not None]
        return {"holds": all(known) if known else None, "verdicts": verdicts}

    def _occupancy(self) -> dict[str, dict[str, float | int | None]]:
        totals, horizon = self._timeline.totals(), self._timeline.end_s - self._timeline.start_s
        usages, blocks = self._usages, sum(usage.kv_blocks for usage in self._usages)
        total_steps = sum(usage.steps for usage in usages)
        return {
            "kv_cache": {
                "blocks": blocks,
                "occupancy_mean": _ratio(totals["kv_blocks"], horizon * blocks),
                "occupancy_peak": max(usage.peak["kv_blocks"] / usage.kv_blocks for usage in usages),
            },
            "batch": {
                "mean_sequences": mean_batch(usages),
                "max_sequences": max(usage.peak["running"] for usage in usages),
                "mean_tokens": _ratio(sum(usage.token_steps for usage in usages), total_steps),
            },
            "queue": {
                "mean_waiting": _ratio(totals["waiting"], horizon),
                "max_waiting": max(usage.peak["waiting"] for usage in usages),
            },
        }

    def _curves(self) -> dict[str, Any]:
        probabilities = np.array(CURVE_PROBABILITIES)
        curves: dict[str, Any] = {"probability": list(CURVE_PROBABILITIES)}
        for name, values in self._latency.items():
            curves[name] = for_plots(values.quantiles(probabilities)) if values.count else None
        return curves

    def _series(self) -> dict[str, Any]:
        rates = {name: for_plots(values) for name, values in self._timeline.rates().items()}
        return {
            "start_s": self._timeline.start_s,
            "bin_s": self._timeline.width_s,
            "duration_s": self._timeline.end_s - self._timeline.start_s,
            "running": rates["running"],
            "waiting": rates["waiting"],
            "kv_blocks": rates["kv_blocks"],
            "prefill_tokens_per_s": rates["prefill_tokens"],
            "output_tokens_per_s": rates["output_tokens"],
        }

    def _littles_law(self) -> LittlesLaw | None:
        horizon = self.last_finish - self.first_arrival
        if not self._completed or horizon <= 0.0:
            return None
        totals = self._timeline.totals()
        return LittlesLaw(
            from_segments=(totals["running"] + totals["waiting"]) / horizon,
            from_requests=self._engine_time / horizon,
            request_seconds=self._engine_time,
            step_share=self._completed * max(usage.longest_step for usage in self._usages) / horizon,
        )


def time_per_output_token(first: Floats, finish: Floats, output: Ints) -> Floats:
    """(E2E - TTFT) / (output - 1) per request in seconds; the egress cancels, 0 where one token has no such time."""
    tokens: Floats = (finish - first) / np.maximum(output - 1, 1)
    return tokens


def for_plots(values: Floats) -> list[float]:
    """Six significant digits: more than a plot shows, and half the bytes."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None
