"""Bands of a result: the run again with its factors off, with the same arrivals, lengths and seed.

Factors are drawn once per run and held: an error of a kernel's efficiency is the same in every step, and would average
out if every step drew its own. First order by default: the three factors that matter most move one at a time, up and
down by 1.645 standard deviations, with what depends on them; all that is left moves at once along the gradient of the
busy time, which makes the change the one it would have in quadrature. `samples` draws all factors at once instead.
Neglected: in the first order, what two factors do together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.spec.curves import NETWORK
from perfsim.uncertainty.factors import (
    DEPLOYMENT,
    HOST,
    KIND_OF_COMPONENT,
    LAUNCH,
    POWER,
    Factor,
    Matrix,
    covariance_of,
    factors_of,
    shifted,
)
from perfsim.uncertainty.rerun import MOST_REQUESTS, SKIPPED_ABOVE, reach_of, shortened
from perfsim.uncertainty.spread import Z, headline, in_quadrature, of_draws, with_power
from perfsim.uncertainty.widen import besides, with_besides

if TYPE_CHECKING:
    from perfsim.metrics.result import Result
    from perfsim.spec.scenario import Scenario
    from perfsim.uncertainty.rerun import Rerun
    from perfsim.uncertainty.spread import Band, Values

ALONE = 3  # factors that move alone; the others move together
VANISHING = 1e-9  # of the variance: rounding
# Components of the breakdown that follow no factor of their own: waiting, and bytes at the rate of a datasheet.
WITHOUT_FACTOR = frozenset(("idle", "slowest rank", "adapter_loading", "compiling"))
PART_OF_HOST = {"host": HOST, "scheduler": HOST, "launches": LAUNCH}
NEGLIGIBLE = 1e-4  # of the busy time, in standard deviations: such factors are not listed


def with_bands(
    result: Result, scenario: Scenario, *, rerun: Rerun, samples: int | None = None, alone: int = ALONE
) -> Result:  # fmt: skip
    """The result with `bands`, the point prediction unchanged, and what they are made of in `provenance`.

    `rerun` answers a scenario as `result` was answered. Reruns see the first 20,000 requests at most; changes relative
    to a run of these are laid over the result. `alone` factors move one at a time: one, hence four reruns, suffices for
    what follows the busy time. Runs of more than 100,000 requests get bands only with `samples`.
    """
    if samples is None and result.simulation["requests"] > SKIPPED_ABOVE:
        return _noted(result, f"not quantified: more than {SKIPPED_ABOVE:,} requests and no samples asked for")
    known, notes = factors_of(scenario, reach_of(scenario, result))
    factors = relevant(known, result, scenario)
    if not factors:
        return _noted(result, "not quantified: the calibration says nothing about how far off it may be")
    covariance, observed = _covariance(scenario, known, factors)
    short = shortened(scenario, result)
    base = result if short is scenario else rerun(short)
    if samples is None:
        bands, runs = _first_order(result, base, short, factors, covariance, rerun, alone=alone)
        method = "first order: factors moved by 1.645 standard deviations, changes added in quadrature"
    else:
        changes = drawn(factors, covariance, seed=scenario.seed, count=samples)
        draws = [headline(rerun(shifted(short, change))) for change in changes]
        bands, runs = of_draws(headline(result), headline(base), draws), samples
        method = "Monte Carlo: all factors drawn at once, quantiles of the runs"
    quantified: dict[str, Any] = {
        "bands": "5-95%",
        "method": method,
        "runs": runs,
        "requests": f"{base.simulation['requests']:,} of {result.simulation['requests']:,}",
        "factors": {
            factor.name: f"±{math.sqrt(max(0.0, variance)):.1%}: {factor.source}"
            for factor, variance in zip(factors, np.diagonal(covariance), strict=True)
        },
        "observed": list(observed),
    }
    if short is not scenario:
        quantified["note"] = (
            f"bands are those of the first requests (at most {MOST_REQUESTS:,}), laid over the whole run"
        )
    more = besides(scenario, result)
    quantified["besides"] = {path: f"-{down:.1%} +{up:.1%}" for path, (down, up) in more.items() if path in bands}
    bands = with_besides(bands, result, scenario)
    return replace(_noted(result, quantified), bands=bands, warnings=[*result.warnings, *notes])


def spread_of_time(scenario: Scenario, result: Result) -> float:
    """The standard deviation of the logarithm of the busy time, to first order and without a run; 0 without spreads.

    All times of a closed loop follow it. Neglected: rates that cannot exceed the datasheet's, and that a collective
    over several nodes is not both inside and between them all the time, as `shares` has it.
    """
    known, _ = factors_of(scenario, reach_of(scenario, result))
    factors = relevant(known, result, scenario)
    covariance, _ = _covariance(scenario, known, factors)
    share = shares(factors, result)
    weight = np.array([share[factor.name] if factor.part != POWER else 0.0 for factor in factors])
    return math.sqrt(max(0.0, float(weight @ covariance @ weight)))


def _covariance(
    scenario: Scenario, known: Sequence[Factor], factors: Sequence[Factor]
) -> tuple[Matrix, tuple[str, ...]]:
    """Covariance of `factors`, given what was observed, which also had those that do not matter here; its sources."""
    everything, observed = covariance_of(scenario, known)
    kept = [known.index(factor) for factor in factors]
    return everything[np.ix_(kept, kept)], observed


def _noted(result: Result, said: Any) -> Result:
    return replace(result, provenance={**result.provenance, "uncertainty": said})


def shares(factors: Sequence[Factor], result: Result) -> dict[str, float]:
    """How much of the busy time follows each factor, by name: d ln(time) / d ln(factor).

    A closed form has no breakdown: all factors count alike. What a collective over several nodes spends inside them is
    not told apart from what it spends between: all of it counts for both, an upper bound that reruns correct.
    """
    spent: dict[str, float] = {}
    for component, seconds in result.breakdown.items():
        if component in WITHOUT_FACTOR:
            continue
        part = PART_OF_HOST.get(component) or KIND_OF_COMPONENT.get(component, "gemm")
        spent[part] = spent.get(part, 0.0) + seconds
    busy = sum(spent.values())
    spent[NETWORK] = spent.get("collective", 0.0)
    return {
        factor.name: 1.0 if not busy or factor.part == DEPLOYMENT else spent.get(factor.part, 0.0) / busy
        for factor in factors
    }


def importance(factors: Sequence[Factor], result: Result) -> dict[str, float]:
    """`shares`, but client latency, which belongs to the host, counts by its share of TTFT, where it matters.

    Launches that hide behind the GPU may outlast it when they take longer, so they always count.
    """
    engine, ttft = result.scenario["calibration"]["engine"], result.metrics["ttft"]["mean"]
    client = (engine["ingress"] + engine["egress"]) / ttft if ttft else 0.0
    share = shares(factors, result)
    least = {HOST: client, LAUNCH: 1.0}
    return {factor.name: max(share[factor.name], least.get(factor.part, 0.0)) for factor in factors}


def relevant(factors: Sequence[Factor], result: Result, scenario: Scenario) -> tuple[Factor, ...]:
    """The factors that the run depends on."""
    share = importance(factors, result)
    experts = any(group.mlp is not None and group.mlp.kind == "moe" for group in scenario.model.layers)
    absent = {POWER} if result.energy.get("joules") is None else set()
    if not result.breakdown:
        absent |= {name for name, there in (("moe", experts), ("collective", scenario.parallel.gpus > 1)) if not there}
    return tuple(
        factor for factor in factors
        if factor.part not in absent
        and (factor.part == POWER or share[factor.name] * factor.sigma > NEGLIGIBLE or factor.sigma == 0.0)
    )  # fmt: skip


def directions(
    factors: Sequence[Factor], covariance: Matrix, share: Mapping[str, float], *, alone: int,
    important: Mapping[str, float] | None = None,
) -> list[dict[str, float]]:  # fmt: skip
    """Moves of the logarithms of the factors, by name, whose outer products sum to the covariance, or nearly.

    A pivoted Cholesky decomposition: the factor with the largest share (`important`, if given) x standard deviation of
    what is left moves by that, and takes along those that depend on it. After `alone` such moves, one along the
    gradient of the time: in the time it does what all that is left does in quadrature. Power moves elsewhere.
    """
    timed = np.array([factor.part != POWER for factor in factors])
    weight = timed * np.array([share[factor.name] for factor in factors])
    pick = timed * np.array([(important or share)[factor.name] for factor in factors])
    left = covariance.copy()
    moves: list[NDArray[np.float64]] = []
    for _ in range(alone):
        size = pick**2 * np.diagonal(left)
        pivot = int(size.argmax())  # the first one of equals: factors come ordered by name
        if size[pivot] <= VANISHING * float(pick**2 @ np.diagonal(covariance)):
            break
        moves.append(left[:, pivot] / math.sqrt(left[pivot, pivot]))
        left = left - np.outer(moves[-1], moves[-1])
    gradient = left @ weight
    variance = float(weight @ gradient)
    if variance > VANISHING * float(weight @ covariance @ weight):
        moves.append(gradient / math.sqrt(variance))
    return [
        {factor.name: float(size) for factor, size in zip(factors, move, strict=True) if size and factor.part != POWER}
        for move in moves
    ]


def _first_order(
    result: Result,
    base: Result,
    short: Scenario,
    factors: Sequence[Factor],
    covariance: Matrix,
    rerun: Rerun,
    *,
    alone: int,
) -> tuple[dict[str, Band], int]:
    """(bands, number of reruns)."""
    # A closed form is quick enough for all factors.
    count = alone if result.breakdown else len(factors)
    share, important = shares(factors, result), importance(factors, result)
    moves = directions(factors, covariance, share, alone=count, important=important)
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


def drawn(factors: Sequence[Factor], covariance: Matrix, *, seed: int, count: int) -> list[dict[str, float]]:
    """`count` draws of the logarithm of every factor, by name: the symmetric root of the covariance times normal draws.

    Each factor has a stream of its own, PCG64 of (seed, "factors", name): one more factor, or another order, leaves the
    draws of all that do not depend on it as they were.
    """
    normal = np.empty((len(factors), count))
    for row, factor in zip(normal, factors, strict=True):
        word = hashlib.sha256(f"factors\0{factor.name}".encode()).digest()[:8]
        sequence = np.random.SeedSequence([seed, int.from_bytes(word, "little")])
        row[:] = np.random.Generator(np.random.PCG64(sequence)).standard_normal(count)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    draws = (root @ normal).T.tolist()
    return [{factor.name: value for factor, value in zip(factors, draw, strict=True)} for draw in draws]
