"""From what a run measured to its Result: breakdown, memory, cost, energy, provenance and warnings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perfsim.metrics.result import Result
from perfsim.units import HOUR

if TYPE_CHECKING:
    from perfsim.cost.memory import MemoryPlan
    from perfsim.metrics.aggregate import Aggregated
    from perfsim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run hands over: aggregated metrics, busy seconds by component and by bound, joules of one GPU above idle.

    The breakdown and the energy are empty where nothing was simulated. `rejected` counts refused requests by reason,
    `backlog` those that were still waiting when the last one arrived; `notes` are warnings of the method itself.
    """

    aggregated: Aggregated
    seconds: Mapping[str, float]
    bound: Mapping[str, float]
    dynamic_joules: float | None
    rejected: Mapping[str, int]
    backlog: float = 0.0
    notes: tuple[str, ...] = ()


ENERGIES = (
    "joules", "gpu_idle_joules", "gpu_dynamic_joules", "host_joules", "joules_per_output_token", "mean_power_w",
)  # fmt: skip


def make_result(scenario: Scenario, memory: MemoryPlan, outcome: Outcome, *, version: str) -> Result:
    """Assemble the Result of `scenario`.

    The breakdown sums to the makespan, idle time and the way from engine to client included. A share of `bound` is of
    busy time.
    """
    aggregated = outcome.aggregated
    makespan = aggregated.makespan_s
    busy = sum(outcome.seconds.values())
    breakdown = dict(sorted(outcome.seconds.items()))
    if makespan is not None and busy:
        breakdown["idle"] = max(0.0, makespan - busy)
    return Result(
        perfsim_version=version,
        scenario=scenario.portable(),
        scenario_hash=scenario.hash,
        seed=scenario.seed,
        metrics=aggregated.metrics,
        breakdown=breakdown,
        bound={name: spent / busy for name, spent in sorted(outcome.bound.items())} if busy else {},
        memory=_memory(scenario, memory),
        cost=_cost(scenario, makespan, aggregated.metrics["counts"]),
        energy=_energy(scenario, makespan, outcome.dynamic_joules, aggregated.metrics["counts"]),
        timeline=aggregated.timeline,
        curves=aggregated.curves,
        simulation=dict(aggregated.simulation),
        provenance=_provenance(scenario),
        warnings=[*outcome.notes, *_warnings(scenario, memory, outcome)],
    )


def _memory(scenario: Scenario, memory: MemoryPlan) -> dict[str, float]:
    used = memory.weights + memory.activations + memory.runtime + memory.kv_cache
    return {
        "weights": memory.weights,
        "kv_cache": memory.kv_cache,
        "activations": memory.activations,
        "runtime": memory.runtime,
        "unused": max(0.0, memory.capacity - used),
    }


def _cost(scenario: Scenario, makespan: float | None, counts: Mapping[str, int]) -> dict[str, float | None]:
    """Dollars: price per GPU-hour x GPUs x makespan; None where no price is published."""
    price = scenario.hardware.accelerator.price_per_hour
    per_hour = None if price is None else price * scenario.parallel.tp
    usd = None if per_hour is None or makespan is None else per_hour * makespan / HOUR
    return {
        "usd": usd,
        "usd_per_hour": per_hour,
        "usd_per_request": _per(usd, counts["completed"]),
        "usd_per_million_output_tokens": _per(usd, counts["output_tokens"] / 1e6),
        "usd_per_million_tokens": _per(usd, (counts["prompt_tokens"] + counts["output_tokens"]) / 1e6),
    }


def _energy(
    scenario: Scenario, makespan: float | None, dynamic: float | None, counts: Mapping[str, int]
) -> dict[str, float | None]:
    """Joules over the makespan: GPUs idle and dynamic, and the replica's share of what the host draws.

    Neglected: cooling and power conversion (PUE), GPUs of the node that the replica does not use.
    """
    node, tp = scenario.hardware, scenario.parallel.tp
    idle_power = node.accelerator.idle_power
    if makespan is None or dynamic is None or idle_power is None or node.accelerator.dynamic_power is None:
        return dict.fromkeys(ENERGIES)
    idle = idle_power * tp * makespan
    host = node.host_power * tp / node.accelerator_count * makespan
    total = idle + dynamic * tp + host
    return {
        "joules": total,
        "gpu_idle_joules": idle,
        "gpu_dynamic_joules": dynamic * tp,
        "host_joules": host,
        "joules_per_output_token": _per(total, counts["output_tokens"]),
        "mean_power_w": _per(total, makespan),
    }


def _per(amount: float | None, count: float) -> float | None:
    return None if amount is None or not count else amount / count


def _provenance(scenario: Scenario) -> dict[str, Any]:
    node, calibration = scenario.hardware, scenario.calibration
    facts = {f"node.{key}": fact for key, fact in node.sources.items()}
    facts.update({f"accelerator.{key}": fact for key, fact in node.accelerator.sources.items()})
    return {
        "calibration": {
            "status": calibration.status,
            "source": calibration.source,
            "borrowed_from": calibration.borrowed_from,
            "engine": f"{calibration.engine.name} {calibration.engine.version}",
        },
        "unverified": sorted(key for key, fact in facts.items() if not fact.verified),
        "uncertainty": "not quantified: no coefficient has been fitted to measurements yet",
    }


def _warnings(scenario: Scenario, memory: MemoryPlan, outcome: Outcome) -> list[str]:
    calibration, policy = scenario.calibration, scenario.policy
    found = []
    if calibration.status == "first-guess":
        found.append("coefficients are first guesses, not fitted: expect errors of tens of percent")
    if calibration.borrowed_from is not None:
        name = scenario.hardware.accelerator.name
        found.append(f"{name} has no measured curves; those of {calibration.borrowed_from} stand in")
    pool = memory.usable_blocks * policy.block_size
    if policy.max_model_len is not None and pool < policy.max_model_len:
        found.append(
            f"vLLM would refuse to start: max_model_len is {policy.max_model_len:,} tokens, the KV cache holds {pool:,}"
        )
    if policy.max_num_seqs is not None and outcome.backlog > policy.max_num_seqs:
        found.append(
            f"overloaded: {outcome.backlog:,.0f} requests were waiting when the last one arrived; latencies grow with "
            "the length of the trace, only throughput is meaningful"
        )
    for reason, count in sorted(outcome.rejected.items()):
        found.append(f"{count:,} requests rejected: {reason}")
    return found
