"""How far the coefficients of a calibration may be off: sizes of the factors that uncertainty bands are made of."""

from __future__ import annotations

import math
from typing import Literal, get_args

from pydantic import Field

from perfsim.spec.base import Spec

OperatorKind = Literal[
    "gemm", "moe", "prefill_attention", "decode_attention", "elementwise", "collective", "network"
]  # "collective": over links inside a node, "network": over what joins nodes
KINDS: tuple[OperatorKind, ...] = get_args(OperatorKind)
Latency = Literal["ttft", "tpot", "itl", "e2e"]


class Spread(Spec):
    """The standard deviation of the logarithm of one multiplicative factor, and where it was read off."""

    sigma: float = Field(ge=0, le=2)
    source: str


class SkewedSpread(Spec):
    """A spread that reaches further to one side: the measured value is `longer` or `shorter` than the predicted one."""

    longer: float = Field(ge=0, le=4)
    shorter: float = Field(ge=0, le=4)
    source: str


class KindSpread(Spread):
    """The spread of one kind of operator inside the range of its measurements.

    `up_to` is the end of that range in tokens: of one step for products, experts and elementwise kernels, of context
    for attention. Beyond it the spread grows; None stands for no known end.
    """

    up_to: float | None = Field(default=None, gt=0)


class Observation(Spec):
    """A whole run that was compared with a measurement: it ties factors together, as what one adds another may lack.

    `shares` of the time per token follow each kind of operator and the host; `sigma` is the standard deviation of
    ln(measured / predicted) for one such run.
    """

    shares: dict[OperatorKind | Literal["host"], float]
    sigma: float = Field(gt=0, le=2)
    source: str


class Observed(Observation):
    """An observation and what it was made on."""

    device: str
    engine: str


class Uncertainty(Spec):
    """Log-normal factors on times, one draw of each per run.

    `kinds` belong to a device, `engine` to host terms and client latency of an engine version, `launch` to what a
    device's host needs to launch a kernel, `deployment` to all times of one run, `power` to energy above idle.
    `borrowed` is added in quadrature to every kind of a device that uses another's curves, `engine_borrowed` to the
    engine. `per_doubling` is added in quadrature per doubling of the work beyond `up_to`. `observed` are whole runs on
    this device and engine: given them, factors are less uncertain and depend on each other. `closed_loop` is what the
    mean TTFT of a closed loop misses besides, where clients queue, and `tails` what the 99th percentile of a latency
    does.
    """

    kinds: dict[OperatorKind, KindSpread]
    engine: Spread
    launch: Spread | None = None
    deployment: Spread
    power: Spread
    borrowed: Spread | None = None
    engine_borrowed: Spread | None = None
    per_doubling: Spread
    observed: tuple[Observation, ...] = ()
    closed_loop: SkewedSpread | None = None
    tails: dict[Latency, Spread] = Field(default_factory=dict)


class EngineSpreads(Spec):
    """The spreads of an engine profile: of its host terms, and of whole runs; None where those of any engine hold."""

    host: Spread | None = None
    deployment: Spread | None = None
    closed_loop: SkewedSpread | None = None


class Foreign(Spread):
    """What all times of a device miss that borrows the curves of one of another make as they are."""

    devices: tuple[str, ...]


class UncertaintyFile(Spec):
    """`hardware/calibration/uncertainty.yaml`: spreads of all devices and engines.

    `devices` replace single kinds for the device whose curves they are, `engines` the spreads of an engine profile.
    """

    kinds: dict[OperatorKind, KindSpread]
    devices: dict[str, dict[OperatorKind, KindSpread]] = Field(default_factory=dict)
    engine: Spread
    engines: dict[str, EngineSpreads] = Field(default_factory=dict)
    launch: Spread | None = None
    deployment: Spread
    power: Spread
    borrowed: Spread
    engine_borrowed: Spread
    foreign: Foreign
    per_doubling: Spread
    closed_loop: SkewedSpread
    tails: dict[Latency, Spread] = Field(default_factory=dict)
    observed: tuple[Observed, ...] = ()

    def resolved(
        self, *, device: str, engine: str, borrowed: bool, engine_borrowed: bool, accelerator: str | None = None,
        law: tuple[Spread, bool] | None = None,
    ) -> Uncertainty:  # fmt: skip
        """The spreads of an accelerator with curves of `device` and the profile of `engine`, wider where borrowed.

        `law` is what a law that carries curves to another maker's devices misses, and whether it was fitted to runs of
        this device and engine.
        """
        own = self.engines.get(engine, EngineSpreads())
        # Of whole runs of another engine than the one whose profile it is, nothing was compared.
        runs = EngineSpreads() if engine_borrowed else own
        observed = tuple(
            Observation(shares=run.shares, sigma=run.sigma, source=run.source)
            for run in self.observed
            if (run.device, run.engine, False, False) == (device, engine, borrowed, engine_borrowed)
        )
        # The spread of an engine's deployments is over devices and models at large; `deployment` is that of runs seen.
        deployment = self.deployment if observed or runs.deployment is None else runs.deployment
        if law is not None:
            spread, seen = law
            # Both are of whole runs, so that one holds what the other says.
            deployment = max(deployment, spread, key=lambda each: each.sigma)
            if not seen:
                deployment = _sum(deployment, self.borrowed)
        elif accelerator in self.foreign.devices:
            deployment = _sum(deployment, self.foreign)
        return Uncertainty(
            kinds={**self.kinds, **self.devices.get(device, {})},
            engine=own.host or self.engine,
            launch=self.launch,
            deployment=deployment,
            closed_loop=runs.closed_loop or self.closed_loop,
            tails=self.tails,
            power=self.power,
            borrowed=self.borrowed if borrowed else None,
            engine_borrowed=self.engine_borrowed if engine_borrowed else None,
            per_doubling=self.per_doubling,
            observed=observed,
        )


def _sum(*spreads: Spread) -> Spread:
    """Independent spreads add in quadrature."""
    return Spread(
        sigma=math.hypot(*(spread.sigma for spread in spreads)), source="; ".join(spread.source for spread in spreads)
    )
