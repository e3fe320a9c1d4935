"""The answer to "how long does this take": a frozen value that adds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from perfsim.ops.op import Num


@dataclass(frozen=True, slots=True)
class Estimate:
    """Time and resources of some work; fields are floats, or arrays over many batches.

    `joules` is dynamic energy only: idle power, host and cooling are integrated over powered time by the simulators.
    `bound_s` splits the seconds by the resource that limits them, `source` is the tier the number came from.
    `d_seconds` maps an uncertainty factor (here: one per operator kind) to d seconds / d ln(factor); it adds linearly,
    and for multiplicative factors it is also the share of the time that the factor carries.
    """

    seconds: Num
    flops: Num = 0.0
    bytes: Num = 0.0
    joules: Num = 0.0
    bound_s: Mapping[str, Num] = field(default_factory=dict)
    source: str = "roofline"
    d_seconds: Mapping[str, Num] = field(default_factory=dict)

    @property
    def bound(self) -> Any:
        """The resource that limits most of the time; an array of names for arrays, "none" for no time at all."""
        if not self.bound_s:
            return "none"
        names = np.array(list(self.bound_s))
        seconds = np.stack(np.broadcast_arrays(*self.bound_s.values()))
        found = np.where(seconds.max(axis=0) > 0.0, names[seconds.argmax(axis=0)], "none")
        return str(found) if found.ndim == 0 else found

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other: everything adds."""
        return Estimate(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.joules + other.joules,
            _add(self.bound_s, other.bound_s),
            self.source if self.source == other.source else "mixed",
            _add(self.d_seconds, other.d_seconds),
        )


def overlap(first: Estimate, second: Estimate) -> Estimate:
    """Both at once on different resources: the longer one sets time, bound and sensitivities; resources add."""
    longer = np.greater_equal(first.seconds, second.seconds)
    return Estimate(
        np.maximum(first.seconds, second.seconds),
        first.flops + second.flops,
        first.bytes + second.bytes,
        first.joules + second.joules,
        _choose(longer, first.bound_s, second.bound_s),
        first.source if first.source == second.source else "mixed",
        _choose(longer, first.d_seconds, second.d_seconds),
    )


def _choose(condition: Any, yes: Mapping[str, Num], no: Mapping[str, Num]) -> dict[str, Num]:
    return {key: np.where(condition, yes.get(key, 0.0), no.get(key, 0.0)) for key in {**yes, **no}}


def _add(first: Mapping[str, Num], second: Mapping[str, Num]) -> dict[str, Num]:
    total = dict(first)
    for key, value in second.items():
        total[key] = total[key] + value if key in total else value
    return total
