"""The factors of one scenario: what may be off, by how much, and what the scenario is like when it is.

One factor per device and kind of operator, one per engine version for host terms and client latency, one per device for
launches where no CUDA graphs are used, one for the deployment and one per device for power. Replica groups that share a
device or an engine share its factors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from perfsim.spec.uncertainty import KINDS, OperatorKind, Spread, Uncertainty
from perfsim.uncertainty.coefficients import slower

if TYPE_CHECKING:
    from perfsim.spec.calibration import Calibration
    from perfsim.spec.scenario import Scenario

Matrix = NDArray[np.float64]

DEPLOYMENT = "deployment"
HOST, LAUNCH, POWER = "host", "launch", "power"
# Names of the components in `Result.breakdown` that belong to a kind; others are parts made of several, mostly GEMMs.
KIND_OF_COMPONENT: dict[str, OperatorKind] = {
    "linear": "gemm", "lm_head": "gemm", "experts": "moe", "prefill_attention": "prefill_attention",
    "decode_attention": "decode_attention", "recurrence": "elementwise", "elementwise": "elementwise",
    "sampling": "elementwise", "communication": "collective",
}  # fmt: skip
CURVES_OF_KIND = {"gemm": "gemm", "moe": "moe", "prefill_attention": "prefill", "decode_attention": "decode"}
STEP_KINDS = ("gemm", "moe", "elementwise")


@dataclass(frozen=True, slots=True)
class Factor:
    """One multiplicative factor: `sigma` is the standard deviation of its logarithm, `source` where that is from.

    `owner` is a device or an engine with its version, `part` a kind of operator, "host", "launch",
    "power" or "deployment".
    """

    owner: str
    part: str
    sigma: float
    source: str

    @property
    def name(self) -> str:
        return f"{self.owner} {self.part}".strip()


@dataclass(frozen=True, slots=True)
class Reach:
    """The largest work of a run in tokens: of one step, and of context of one sequence."""

    step: float
    context: float

    def of(self, kind: OperatorKind) -> float:
        return self.step if kind in STEP_KINDS else self.context


def calibrations(scenario: Scenario) -> Iterator[tuple[str, Calibration]]:
    """(device, calibration) of the scenario and of each replica group with another one."""
    yield scenario.hardware.accelerator.name, scenario.calibration
    for group in scenario.deployment.groups:
        if group.hardware is not None or group.calibration is not None:
            node = group.hardware or scenario.hardware
            yield node.accelerator.name, group.calibration or scenario.calibration


def launches_eagerly(scenario: Scenario) -> bool:
    """Whether any replica runs without CUDA graphs."""
    policies = [scenario.policy, *(group.policy for group in scenario.deployment.groups if group.policy is not None)]
    return any(policy.enforce_eager for policy in policies)


def leaves_node(scenario: Scenario) -> bool:
    """Whether any replica has more GPUs than its node, so that its ranks talk over the network."""
    groups = scenario.deployment.groups
    shapes = [(group.parallel or scenario.parallel, group.hardware or scenario.hardware) for group in groups]
    return any(plan.gpus > node.accelerator_count for plan, node in shapes or [(scenario.parallel, scenario.hardware)])


def factors_of(scenario: Scenario, reach: Reach) -> tuple[tuple[Factor, ...], tuple[str, ...]]:
    """(factors ordered by name, notes about work outside the calibrated range); no factors without spreads."""
    found: dict[str, Factor] = {}
    notes: dict[str, None] = {}
    eager = launches_eagerly(scenario)
    kinds = [kind for kind in KINDS if kind != "network" or leaves_node(scenario)]
    for device, calibration in calibrations(scenario):
        spreads = calibration.uncertainty
        if spreads is None:
            continue
        for factor in _of_device(device, calibration, spreads, reach, kinds, notes):
            found.setdefault(factor.name, factor)
        engine = f"{calibration.engine.name} {calibration.engine.version}"
        parts = [spreads.engine, *([spreads.engine_borrowed] if spreads.engine_borrowed else [])]
        host = _factor(engine, HOST, parts)
        found.setdefault(host.name, host)
        if eager and spreads.launch is not None:
            launch = _factor(device, LAUNCH, [spreads.launch])
            found.setdefault(launch.name, launch)
        found.setdefault(DEPLOYMENT, _factor("", DEPLOYMENT, [spreads.deployment]))
    return tuple(found[name] for name in sorted(found)), tuple(notes)


def _of_device(
    device: str,
    calibration: Calibration,
    spreads: Uncertainty,
    reach: Reach,
    kinds: Sequence[OperatorKind],
    notes: dict[str, None],
) -> Iterator[Factor]:
    measured = calibration.device.curves.discrepancy
    for kind in kinds:
        key = CURVES_OF_KIND.get(kind, kind)
        parts: list[Spread]
        if key in measured:  # on a device that borrows: of devices that were left out of the fit
            parts = [
                Spread(sigma=measured[key], source=f"{calibration.device.curves.source}, shapes or devices kept out")
            ]
        elif kind in spreads.kinds:
            parts = [spreads.kinds[kind], *([spreads.borrowed] if spreads.borrowed else [])]
        else:
            continue
        end = spreads.kinds[kind].up_to if kind in spreads.kinds else None
        if end is not None and reach.of(kind) > end:
            doublings = math.log2(reach.of(kind) / end)
            parts.append(Spread(sigma=spreads.per_doubling.sigma * doublings, source=spreads.per_doubling.source))
            what = "a step" if kind in STEP_KINDS else "a context"
            notes[
                f"outside the calibrated range, bands are widened: {kind.replace('_', ' ')} was measured up to {what} "
                f"of {end:,.0f} tokens, this run reaches {reach.of(kind):,.0f}"
            ] = None
        yield _factor(device, kind, parts)
    yield _factor(device, POWER, [spreads.power])


def _factor(owner: str, part: str, parts: Sequence[Spread]) -> Factor:
    """Independent spreads add in quadrature."""
    sigma = math.sqrt(sum(spread.sigma**2 for spread in parts))
    return Factor(owner, part, sigma, "; ".join(spread.source for spread in parts if spread.sigma > 0))


def covariance_of(scenario: Scenario, factors: Sequence[Factor]) -> tuple[Matrix, tuple[str, ...]]:
    """Covariance of the logarithms of the factors, in their order, given the whole runs that were compared; sources.

    With prior S = diag(sigma^2), and each run's time following the factors with the shares h and error s, it is
    (S^-1 + sum of h h^T / s^2)^-1, computed as rank-one updates so that a sigma of zero is allowed. Runs tell little
    about one factor and much about their sum: given them, kernels and host depend on each other.
    """
    index = {factor.name: position for position, factor in enumerate(factors)}
    covariance = np.diag([factor.sigma**2 for factor in factors])
    sources: dict[str, None] = {}
    for device, calibration in calibrations(scenario):
        engine = f"{calibration.engine.name} {calibration.engine.version}"
        for run in calibration.uncertainty.observed if calibration.uncertainty is not None else ():
            share = np.zeros(len(factors))
            for part, value in run.shares.items():
                position = index.get(f"{engine if part == HOST else device} {part}")
                if position is not None:
                    share[position] = value
            gain = covariance @ share
            covariance = covariance - np.outer(gain, gain) / (run.sigma**2 + share @ gain)
            sources[run.source] = None
    return covariance, tuple(sources)


def shifted(scenario: Scenario, shifts: Mapping[str, float]) -> Scenario:
    """The scenario when the logarithm of each factor, by name, is off by so much; all else stays."""

    def moved(device: str, calibration: Calibration) -> Calibration:
        common = shifts.get(DEPLOYMENT, 0.0)
        kinds = {kind: math.exp(shifts.get(f"{device} {kind}", 0.0) + common) for kind in KINDS}
        engine = f"{calibration.engine.name} {calibration.engine.version} {HOST}"
        return slower(
            calibration, kinds=kinds, host=math.exp(shifts.get(engine, 0.0) + common),
            launch=math.exp(shifts.get(f"{device} {LAUNCH}", 0.0) + common),
            power=math.exp(shifts.get(f"{device} {POWER}", 0.0)),
        )  # fmt: skip

    groups = []
    for group in scenario.deployment.groups:
        if group.hardware is not None or group.calibration is not None:
            node = group.hardware or scenario.hardware
            own = moved(node.accelerator.name, group.calibration or scenario.calibration)
            groups.append(group.model_copy(update={"calibration": own}))
        else:
            groups.append(group)
    return scenario.model_copy(
        update={
            "calibration": moved(scenario.hardware.accelerator.name, scenario.calibration),
            "deployment": scenario.deployment.model_copy(update={"groups": tuple(groups)}),
        }
    )
