"""What is asked of the system: a trace to replay, or arrivals and lengths to draw."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Seconds, Spec

Rate = Annotated[float, Field(gt=0, le=1e9)]
Count = Annotated[int, Field(gt=0, le=10**9)]


class FixedLength(Spec):
    """Every request has `tokens` tokens."""

    kind: Literal["fixed"] = "fixed"
    tokens: int = Field(gt=0, le=10**8)


class UniformLength(Spec):
    """Uniform integers in [low, high], both included."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(gt=0)
    high: int = Field(gt=0, le=10**8)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) must be at least low ({self.low})")
        return self


class LognormalLength(Spec):
    """Lognormal with mean `mean` and log-space deviation `sigma`, rounded and clipped to [1, max]."""

    kind: Literal["lognormal"] = "lognormal"
    mean: float = Field(gt=0, le=1e8)
    sigma: float = Field(default=1.0, ge=0, le=5)
    max: int = Field(default=10**8, gt=0, le=10**8)


class GeometricLength(Spec):
    """Geometric on 1, 2, ... with mean `mean`: the memoryless output length."""

    kind: Literal["geometric"] = "geometric"
    mean: float = Field(ge=1, le=1e8)


Length = Annotated[FixedLength | UniformLength | LognormalLength | GeometricLength, Field(discriminator="kind")]


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


class ClosedLoop(Spec):
    """`concurrency` clients, each sending its next request `think_time` after the answer to the last one."""

    kind: Literal["closed"] = "closed"
    concurrency: int = Field(gt=0, le=10**6)
    think_time: Annotated[Seconds, Field(le=1e6)] = 0.0


Arrivals = Annotated[
    PoissonArrivals | GammaArrivals | ConstantArrivals | QuantisedArrivals | ClosedLoop, Field(discriminator="kind")
]


class SharedPrefix(Spec):
    """Prompts begin with one of `num_prefixes` common prefixes of `tokens` tokens, chosen in rotation or at random."""

    num_prefixes: int = Field(gt=0, le=10**7)
    tokens: int = Field(gt=0, le=10**8)
    order: Literal["rotation", "random"] = "rotation"


class TraceWorkload(Spec):
    """Replay of recorded requests from `trace`: a packaged name or a CSV, JSONL or Parquet file.

    `time_scale` stretches the arrival times (2: half the rate), `num_requests` keeps the first n. `arrivals` replaces
    the recorded times. `content_hash` (SHA-256 of the file) is filled in by the loader, so that the scenario hash
    covers what is in the file.
    """

    kind: Literal["trace"] = "trace"
    trace: str
    time_scale: float = Field(default=1.0, gt=0, le=1e6)
    num_requests: Count | None = None
    arrivals: Arrivals | None = None
    content_hash: str | None = None

    @model_validator(mode="after")
    def _one_clock(self) -> Self:
        if self.arrivals is not None and self.time_scale != 1.0:
            raise ValueError("time_scale stretches the recorded times, which arrivals replaces; set one of the two")
        return self


class SyntheticWorkload(Spec):
    """`num_requests` requests drawn from an arrival process and two length distributions.

    `prompt` counts all prompt tokens, a shared prefix included (longer of the two wins).
    """

    kind: Literal["synthetic"] = "synthetic"
    num_requests: Count
    arrivals: Arrivals
    prompt: Length
    output: Length
    shared_prefix: SharedPrefix | None = None


Workload = Annotated[TraceWorkload | SyntheticWorkload, Field(discriminator="kind")]
