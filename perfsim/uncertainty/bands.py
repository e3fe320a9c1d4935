"""Bands of a result: the run again with its factors off, with the same arrivals, lengths and seed.

Factors are drawn once per run and held: an error of a kernel's efficiency is the same in every step, and would average
out if every step drew its own. First order by default: the three factors that matter most move alone, one at a time,
up and down by 1.645 standard deviations; all others move together along the gradient of the busy time, which makes
their joint change the one they would have in quadrature. `samples` draws all factors at once instead.
Neglected: factors that depend on each other, and in the first order what two of them do together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from perfsim.uncertainty.factors import DEPLOYMENT, HOST, KIND_OF_COMPONENT, POWER, Factor, factors_of, shifted
from perfsim.uncertainty.rerun import MOST_REQUESTS, SKIPPED_ABOVE, reach_of, shortened
from perfsim.uncertainty.spread import Z, headline, in_quadrature, of_draws, with_power

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario
    from perfsim.uncertainty.rerun import Rerun
    from perfsim.uncertainty.spread import Band, Values

ALONE = 3  # factors that move alone; the others move together
# Components of the breakdown that follow no factor of their own: waiting, and bytes at the rate of a datasheet.
WITHOUT_FACTOR = frozenset(("idle", "slowest rank", "adapter_loading"))
NEGLIGIBLE = 1e-4  # of the busy time, in standard deviations: such factors are not listed


def with_bands(result: Result, scenario: Scenario, *, rerun: Rerun, samples: int | None = None) -> Result:
    """The result with `bands`, the point prediction unchanged, and what they are made of in `provenance`.

    `rerun` answers a scenario as `result` was answered. Reruns see the first 20,000 requests at most; changes relative
    to a run of these are laid over the result. Runs of more than 100,000 requests get bands only with `samples`.
    """
    if samples is None and result.simulation["requests"] > SKIPPED_ABOVE:
        return _noted(result, f"not quantified: more than {SKIPPED_ABOVE:,} requests and no samples asked for")
    factors, notes = factors_of(scenario, reach_of(scenario, result))
    factors = relevant(factors, result, scenario)
    if not factors:
        return _noted(result, "not quantified: the calibration says nothing about how far off it may be")
    short = shortened(scenario, result)
    base = result if short is scenario else rerun(short)
    if samples is None:
        bands, runs = _first_order(result, base, short, factors, rerun)
        method = "first order: factors moved by 1.645 standard deviations, changes added in quadrature"
    else:
        draws = [headline(rerun(shifted(short, draw))) for draw in drawn(factors, seed=scenario.seed, count=samples)]
        bands, runs = of_draws(headline(result), headline(base), draws), samples
        method = "Monte Carlo: all factors drawn at once, quantiles of the runs"
    quantified: dict[str, Any] = {
        "bands": "5-95%",
        "method": method,
        "runs": runs,
        "requests": f"{base.simulation['requests']:,} of {result.simulation['requests']:,}",
        "factors": {factor.name: f"±{factor.sigma:.0%}: {factor.source}" for factor in factors},
    }
    if short is not scenario:
        quantified["note"] = (
            f"bands are those of the first requests (at most {MOST_REQUESTS:,}), laid over the whole run"
        )
    return replace(_noted(result, quantified), bands=bands, warnings=[*result.warnings, *notes])


def _noted(result: Result, said: Any) -> Result:
    return replace(result, provenance={**result.provenance, "uncertainty": said})


def shares(factors: Sequence[Factor], result: Result) -> dict[str, float]:
    """How much of the busy time follows each factor, by name: d ln(time) / d ln(factor).

    Client latency counts for the host by its share of TTFT, where it matters. A closed form has no breakdown: all
    factors count alike.
    """
    spent: dict[str, float] = {}
    for component, seconds in result.breakdown.items():
        if component in WITHOUT_FACTOR:
            continue
        part = HOST if component in ("host", "scheduler") else KIND_OF_COMPONENT.get(component, "gemm")
        spent[part] = spent.get(part, 0.0) + seconds
    busy = sum(spent.values())
    engine, ttft = result.scenario["calibration"]["engine"], result.metrics["ttft"]["mean"]
    client = (engine["ingress"] + engine["egress"]) / ttft if ttft else 0.0
    found = {}
    for factor in factors:
        share = 1.0 if not busy or factor.part == DEPLOYMENT else spent.get(factor.part, 0.0) / busy
        found[factor.name] = max(share, client) if factor.part == HOST else share
    return found


def relevant(factors: Sequence[Factor], result: Result, scenario: Scenario) -> tuple[Factor, ...]:
    """The factors that the run depends on."""
    share = shares(factors, result)
    experts = any(group.mlp is not None and group.mlp.kind == "moe" for group in scenario.model.layers)
    absent = {POWER} if result.energy.get("joules") is None else set()
    if not result.breakdown:
        absent |= {name for name, there in (("moe", experts), ("collective", scenario.parallel.gpus > 1)) if not there}
    return tuple(
        factor for factor in factors
        if factor.part not in absent
        and (factor.part == POWER or share[factor.name] * factor.sigma > NEGLIGIBLE or factor.sigma == 0.0)
    )  # fmt: skip


def directions(factors: Sequence[Factor], result: Result) -> list[dict[str, float]]:
    """Unit moves in standard deviations, times sigma, by name: each of the most important factors alone, the rest once.

    A factor matters as much as its share of the time times its standard deviation.
    """
    share = shares(factors, result)
    weight = {factor.name: share[factor.name] * factor.sigma for factor in factors if factor.part != POWER}
    sigma = {factor.name: factor.sigma for factor in factors}
    order = sorted((name for name in weight if sigma[name] > 0), key=lambda name: (-weight[name], name))
    count = ALONE if result.breakdown else len(order)  # a closed form is quick enough for all of them
    found = [{name: sigma[name]} for name in order[:count]]
    rest = order[count:]
    length = math.sqrt(sum(weight[name] ** 2 for name in rest))
    if length > 0:
        found.append({name: sigma[name] * weight[name] / length for name in rest})
    return found


def _first_order(
    result: Result, base: Result, short: Scenario, factors: Sequence[Factor], rerun: Rerun
) -> tuple[dict[str, Band], int]:
    """(bands, number of reruns)."""
    moves = directions(factors, result)
    pairs: list[tuple[Values, Values]] = []
    for move in moves:
        slow, fast = (
            headline(rerun(shifted(short, {name: sign * size for name, size in move.items()}))) for sign in (Z, -Z)
        )
        pairs.append((slow, fast))
    start = headline(base)
    for factor in factors:
        if factor.part == POWER:
            power = short.calibration.power
            most = -math.log(min(power.compute_fraction, power.memory_fraction))
            up, down = min(Z * factor.sigma, most), -Z * factor.sigma
            pairs.append((with_power(start, base, up), with_power(start, base, down)))
    return in_quadrature(headline(result), start, pairs), 2 * len(moves)


def drawn(factors: Sequence[Factor], *, seed: int, count: int) -> list[dict[str, float]]:
    """`count` draws of the logarithm of every factor, by name.

    Each factor has a stream of its own, PCG64 of (seed, "factors", name): one more factor, or another order, leaves the
    draws of all others as they were.
    """
    columns = {}
    for factor in factors:
        word = hashlib.sha256(f"factors\0{factor.name}".encode()).digest()[:8]
        sequence = np.random.SeedSequence([seed, int.from_bytes(word, "little")])
        normal = np.random.Generator(np.random.PCG64(sequence)).standard_normal(count)
        columns[factor.name] = (factor.sigma * normal).tolist()
    return [{name: column[index] for name, column in columns.items()} for index in range(count)]
