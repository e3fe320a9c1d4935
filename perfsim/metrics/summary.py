"""From what a run measured to its Result: breakdown, memory, cost, energy, provenance and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from perfsim.metrics.result import Result
from perfsim.units import HOUR

if TYPE_CHECKING:
    from perfsim.cost.memory import MemoryPlan
    from perfsim.metrics.aggregate import Aggregated
    from perfsim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True)
class GroupUse:
    """What equal replicas were used for: seconds summed over `replicas` of them, joules of one GPU above idle.

    `scenario` is that of one replica alone; `powered_s` None stands for the makespan of each. The breakdown and the
    energy are empty where nothing was simulated.
    """

    scenario: Scenario
    memory: MemoryPlan
    replicas: int = 1
    powered_s: float | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    bound: Mapping[str, float] = field(default_factory=dict)
    dynamic_joules: float | None = None

    def powered(self, makespan: float) -> float:
        """Replica-seconds that are paid for."""
        return self.replicas * makespan if self.powered_s is None else self.powered_s


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run hands over: aggregated metrics and what each group of replicas was used for.

    `rejected` counts refused requests by reason, `backlog` those that were still waiting when the last one arrived,
    `notes` are warnings of the method itself, `replicas` rows of `Result.replicas`, `service` metrics that only a
    cluster has.
    """

    aggregated: Aggregated
    groups: tuple[GroupUse, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)
    backlog: float = 0.0
    notes: tuple[str, ...] = ()
    replicas: tuple[Mapping[str, Any], ...] = ()
    service: Mapping[str, Any] = field(default_factory=dict)


ENERGIES = (
    "joules", "gpu_idle_joules", "gpu_dynamic_joules", "host_joules", "joules_per_output_token", "mean_power_w",
)  # fmt: skip


def make_result(scenario: Scenario, outcome: Outcome, *, version: str) -> Result:
    """Assemble the Result of `scenario`.

    The breakdown is of the mean powered replica and sums to the makespan, idle time and the way from engine to client
    included. A share of `bound` is of busy time. Memory is that of a GPU of the first group.
    """
    aggregated, groups = outcome.aggregated, outcome.groups
    makespan, counts = aggregated.makespan_s, aggregated.metrics["counts"]
    seconds, bound = (_summed([getattr(group, name) for group in groups]) for name in ("seconds", "bound"))
    busy = sum(seconds.values())
    powered = sum(group.powered(makespan) for group in groups) if makespan else 0.0
    share = makespan / powered if makespan and powered else 1.0
    breakdown = {name: spent * share for name, spent in sorted(seconds.items())}
    if makespan is not None and busy:
        breakdown["idle"] = max(0.0, makespan - busy * share)
    return Result(
        perfsim_version=version,
        scenario=scenario.portable(),
        scenario_hash=scenario.hash,
        seed=scenario.seed,
        metrics={**aggregated.metrics, **outcome.service},
        breakdown=breakdown,
        bound={name: spent / busy for name, spent in sorted(bound.items())} if busy else {},
        memory=_memory(groups[0].memory),
        cost=_cost(groups, makespan, counts),
        energy=_energy(groups, makespan, counts),
        timeline=aggregated.timeline,
        curves=aggregated.curves,
        simulation=dict(aggregated.simulation),
        provenance=_provenance(groups),
        replicas=[dict(row) for row in outcome.replicas],
        warnings=[*outcome.notes, *_warnings(outcome)],
    )


def _summed(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _memory(memory: MemoryPlan) -> dict[str, float]:
    used = memory.weights + memory.activations + memory.runtime + memory.kv_cache
    return {
        "weights": memory.weights,
        "kv_cache": memory.kv_cache,
        "activations": memory.activations,
        "runtime": memory.runtime,
        "unused": max(0.0, memory.capacity - used),
    }


def _cost(
    groups: Sequence[GroupUse], makespan: float | None, counts: Mapping[str, int]
) -> dict[str, float | None]:  # fmt: skip
    """Dollars: price per GPU-hour x GPUs x powered time; None where no price is published.

    Replicas that start, drain or are under repair are paid for.
    """
    prices = [group.scenario.hardware.accelerator.price_per_hour for group in groups]
    gpus = [group.scenario.parallel.gpus for group in groups]
    usd: float | None = None
    per_hour: float | None = None
    if None not in prices:
        rates = [(price or 0.0) * number for price, number in zip(prices, gpus, strict=True)]
        per_hour = sum(rate * group.replicas for rate, group in zip(rates, groups, strict=True))
        if makespan is not None:
            usd = sum(rate * group.powered(makespan) for rate, group in zip(rates, groups, strict=True)) / HOUR
            if makespan and any(group.powered_s is not None for group in groups):
                per_hour = usd / makespan * HOUR
    return {
        "usd": usd,
        "usd_per_hour": per_hour,
        "usd_per_request": _per(usd, counts["completed"]),
        "usd_per_million_output_tokens": _per(usd, counts["output_tokens"] / 1e6),
        "usd_per_million_tokens": _per(usd, (counts["prompt_tokens"] + counts["output_tokens"]) / 1e6),
    }


def _energy(
    groups: Sequence[GroupUse], makespan: float | None, counts: Mapping[str, int]
) -> dict[str, float | None]:  # fmt: skip
    """Joules over the powered time: GPUs idle and dynamic, and the replicas' shares of what their hosts draw.

    Neglected: cooling and power conversion (PUE), GPUs of the nodes that no replica uses.
    """
    idle = dynamic = host = 0.0
    for group in groups:
        node, gpus = group.scenario.hardware, group.scenario.parallel.gpus
        idle_power = node.accelerator.idle_power
        known = idle_power is not None and node.accelerator.dynamic_power is not None
        if makespan is None or group.dynamic_joules is None or idle_power is None or not known:
            return dict.fromkeys(ENERGIES)
        powered = group.powered(makespan)
        idle += idle_power * gpus * powered
        dynamic += group.dynamic_joules * gpus
        host += node.host_power * gpus / node.accelerator_count * powered
    total = idle + dynamic + host
    return {
        "joules": total,
        "gpu_idle_joules": idle,
        "gpu_dynamic_joules": dynamic,
        "host_joules": host,
        "joules_per_output_token": _per(total, counts["output_tokens"]),
        "mean_power_w": _per(total, makespan or 0.0),
    }


def _per(amount: float | None, count: float) -> float | None:
    return None if amount is None or not count else amount / count


def _provenance(groups: Sequence[GroupUse]) -> dict[str, Any]:
    facts = {}
    for group in groups:
        node = group.scenario.hardware
        facts.update({f"node.{key}": fact for key, fact in node.sources.items()})
        facts.update({f"accelerator.{key}": fact for key, fact in node.accelerator.sources.items()})
    calibration = groups[0].scenario.calibration
    return {
        "calibration": {
            "status": calibration.status,
            "source": calibration.source,
            "borrowed_from": calibration.borrowed_from,
            "engine": f"{calibration.engine.name} {calibration.engine.version}",
        },
        "unverified": sorted(key for key, fact in facts.items() if not fact.verified),
        "uncertainty": "not quantified: no bands were asked for",
    }


def _warnings(outcome: Outcome) -> list[str]:
    found: dict[str, None] = {}
    for group in outcome.groups:
        calibration, policy = group.scenario.calibration, group.scenario.policy
        if calibration.status == "first-guess" and calibration.device.curves.source:
            found["kernels are fitted to measurements; other coefficients are first guesses or few fits on one GPU"] = (
                None
            )
        elif calibration.status == "first-guess":
            found["coefficients are first guesses, not fitted: expect errors of tens of percent"] = None
        if calibration.borrowed_from is not None:
            name = group.scenario.hardware.accelerator.name
            carried = calibration.device.curves.source.partition("; ")[2]  # how, where another maker's device has them
            those = f"{calibration.borrowed_from}, {carried}," if carried else calibration.borrowed_from
            found[f"{name} has no measured curves; those of {those} stand in"] = None
        if calibration.engine_borrowed is not None:
            found[f"{calibration.engine.name}: {calibration.engine_borrowed}"] = None
        pool = group.memory.usable_blocks * group.memory.block_size
        if policy.max_model_len is not None and pool < policy.max_model_len:
            found[
                f"vLLM would refuse to start: max_model_len is {policy.max_model_len:,} tokens, the KV cache holds "
                f"{pool:,}"
            ] = None
    slots = sum(
        group.replicas * group.scenario.parallel.dp * (group.scenario.policy.max_num_seqs or 0)
        for group in outcome.groups
    )
    if slots and outcome.backlog > slots:
        found[
            f"overloaded: {outcome.backlog:,.0f} requests were waiting when the last one arrived; latencies grow with "
            "the length of the trace, only throughput is meaningful"
        ] = None
    for reason, count in sorted(outcome.rejected.items()):
        found[f"{count:,} requests rejected: {reason}"] = None
    failed = outcome.aggregated.metrics["counts"].get("failed", 0)
    if failed:
        found[f"{failed:,} requests failed: their replicas went down too often"] = None
    return list(found)
