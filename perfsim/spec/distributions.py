"""Distributions of what differs from request to request: lengths in tokens and times in seconds."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from perfsim.spec.base import Seconds, Spec

Time = Annotated[Seconds, Field(le=1e6)]


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


class FixedTurns(Spec):
    """Every session has `turns` turns."""

    kind: Literal["fixed"] = "fixed"
    turns: int = Field(gt=0, le=10**4)


class UniformTurns(Spec):
    """Uniform integers in [low, high], both included."""

    kind: Literal["uniform"] = "uniform"
    low: int = Field(gt=0)
    high: int = Field(gt=0, le=10**4)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high}) must be at least low ({self.low})")
        return self


class GeometricTurns(Spec):
    """Geometric on 1, 2, ... with mean `mean`, at most 10,000: the chance of one more turn never changes."""

    kind: Literal["geometric"] = "geometric"
    mean: float = Field(ge=1, le=1e3)


Turns = Annotated[FixedTurns | UniformTurns | GeometricTurns, Field(discriminator="kind")]


class FixedTime(Spec):
    """Always `seconds`."""

    kind: Literal["fixed"] = "fixed"
    seconds: Time


class UniformTime(Spec):
    """Uniform between `low` and `high`."""

    kind: Literal["uniform"] = "uniform"
    low: Time = 0.0
    high: Time

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.high < self.low:
            raise ValueError(f"high ({self.high:g} s) must be at least low ({self.low:g} s)")
        return self


class ExponentialTime(Spec):
    """Exponential with mean `mean`."""

    kind: Literal["exponential"] = "exponential"
    mean: Time


class LognormalTime(Spec):
    """Lognormal with mean `mean` and log-space deviation `sigma`, clipped to `max`: a long tail of slow tools."""

    kind: Literal["lognormal"] = "lognormal"
    mean: Annotated[Time, Field(gt=0)]
    sigma: float = Field(default=1.0, ge=0, le=5)
    max: Time = 1e6


Duration = Annotated[FixedTime | UniformTime | ExponentialTime | LognormalTime, Field(discriminator="kind")]
