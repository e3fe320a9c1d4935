"""When requests, or sessions, are sent: open-loop arrival processes and the closed loop."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Seconds, Spec
from perfsim.units import DAY

Rate = Annotated[float, Field(gt=0, le=1e9)]
RateOrZero = Annotated[float, Field(ge=0, le=1e9)]
Period = Annotated[Seconds, Field(gt=0, le=1e9)]


class PoissonArrivals(Spec):
    """Open loop, exponential gaps, `rate` requests/s."""

    kind: Literal["poisson"] = "poisson"
    rate: Rate


class GammaArrivals(Spec):
    """Open loop, Gamma gaps of mean 1/rate and coefficient of variation `cv` (cv > 1 is burstier than Poisson)."""

    kind: Literal["gamma"] = "gamma"
    rate: Rate
    cv: float = Field(ge=1e-6, le=100)


class ConstantArrivals(Spec):
    """Open loop, equal gaps of 1/rate."""

    kind: Literal["constant"] = "constant"
    rate: Rate


class QuantisedArrivals(Spec):
    """Poisson arrivals whose times are rounded down to multiples of `quantum`, as batching clients and traces show."""

    kind: Literal["quantised"] = "quantised"
    rate: Rate
    quantum: Annotated[Seconds, Field(ge=1e-9)]


class DiurnalArrivals(Spec):
    """Poisson arrivals whose rate swings: rate * (1 + amplitude * sin(2 pi (t + phase) / period)), mean `rate`.

    With `phase` 0 the stream starts at the mean and rises; a quarter of `period` starts it at the peak.
    """

    kind: Literal["diurnal"] = "diurnal"
    rate: Rate
    amplitude: float = Field(ge=0, le=1)
    period: Period = DAY
    phase: Annotated[Seconds, Field(le=1e9)] = 0.0


class BurstyArrivals(Spec):
    """Poisson arrivals whose rate jumps between `base_rate` and `burst_rate` (Markov-modulated, two states).

    The states last exponential times of mean `base_duration` and `burst_duration`; the first one is drawn from the
    stationary distribution, so the stream is in equilibrium from the start.
    """

    kind: Literal["bursty"] = "bursty"
    base_rate: RateOrZero
    burst_rate: Rate
    base_duration: Period
    burst_duration: Period

    @model_validator(mode="after")
    def _states_matter(self) -> Self:
        per_cycle = self.rate * (self.base_duration + self.burst_duration)
        if per_cycle < 1e-3:
            raise ValueError(
                f"only {per_cycle:g} requests per base and burst period; expected longer periods, or poisson"
            )
        return self

    @property
    def rate(self) -> float:
        """Mean requests/s."""
        whole = self.base_duration + self.burst_duration
        return (self.base_rate * self.base_duration + self.burst_rate * self.burst_duration) / whole


class CurveArrivals(Spec):
    """Poisson arrivals whose rate follows `points`, pairs of (seconds, requests/s), the first at 0.

    `step` holds each rate until the next point, `linear` joins the points. With `period` the curve repeats (under
    `linear` the last point is joined to the first of the next period); without it the last rate lasts for ever.
    """

    kind: Literal["curve"] = "curve"
    points: tuple[tuple[Annotated[Seconds, Field(le=1e9)], RateOrZero], ...] = Field(min_length=1, max_length=10**6)
    shape: Literal["step", "linear"] = "step"
    period: Period | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        times = [time for time, _ in self.points]
        if times[0] != 0.0:
            raise ValueError(f"the first point must be at 0 seconds, got {times[0]:g}")
        for before, after in pairwise(times):
            if after <= before:
                raise ValueError(f"the times of points must increase, but {after:g} s follows {before:g} s")
        if self.period is not None and self.period <= times[-1]:
            raise ValueError(f"period ({self.period:g} s) must be longer than the last point's time ({times[-1]:g} s)")
        if self.period is None and not self.points[-1][1]:
            raise ValueError("without a period the last rate lasts for ever and must not be 0")
        if not any(rate for _, rate in self.points):
            raise ValueError("at least one rate must be above 0")
        return self


class StagedArrivals(Spec):
    """A load test in `stages`, pairs of (requests/s, seconds), one after the other on the same warm engine.

    As inference-perf's load generator sends them: in each stage floor(rate * seconds) requests with exponential gaps,
    stretched so that the last one is sent when the stage ends. A stage begins `pause` after the last answer to the one
    before (conversations do not wait for that).
    """

    kind: Literal["stages"] = "stages"
    stages: tuple[tuple[Rate, Period], ...] = Field(min_length=1, max_length=1000)
    pause: Annotated[Seconds, Field(le=1e6)] = 0.0

    @model_validator(mode="after")
    def _every_stage_sends(self) -> Self:
        for rate, seconds in self.stages:
            if rate * seconds < 1:
                raise ValueError(f"a stage of {rate:g} requests/s for {seconds:g} s sends nothing")
        return self

    @property
    def counts(self) -> tuple[int, ...]:
        """Requests of each stage; the 1e-9 keeps 0.1 * 10 from being rounded down to nothing."""
        return tuple(int(rate * seconds + 1e-9) for rate, seconds in self.stages)

    @property
    def rate(self) -> float:
        """Mean requests/s, pauses left out."""
        return sum(self.counts) / sum(seconds for _, seconds in self.stages)


class ClosedLoop(Spec):
    """`concurrency` clients, each sending its next request `think_time` after the answer to the last one."""

    kind: Literal["closed"] = "closed"
    concurrency: int = Field(gt=0, le=10**6)
    think_time: Annotated[Seconds, Field(le=1e6)] = 0.0


OpenLoop = (
    PoissonArrivals
    | GammaArrivals
    | ConstantArrivals
    | QuantisedArrivals
    | DiurnalArrivals
    | BurstyArrivals
    | CurveArrivals
    | StagedArrivals
)
Arrivals = Annotated[OpenLoop | ClosedLoop, Field(discriminator="kind")]
