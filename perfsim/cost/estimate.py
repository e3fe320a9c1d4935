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
    `bound` names what limits it (an array of names for arrays), `source` the tier the number came from. `d_seconds`
    maps an uncertainty factor (here: one per operator kind) to d seconds / d ln(factor); it adds linearly, and for
    multiplicative factors it is also the share of the time that the factor carries.
    """

    seconds: Num
    flops: Num = 0.0
    bytes: Num = 0.0
    joules: Num = 0.0
    bound: Any = "none"
    source: str = "roofline"
    d_seconds: Mapping[str, Num] = field(default_factory=dict)

    def __add__(self, other: Estimate) -> Estimate:
        """One after the other: everything adds, the longer part names the bound."""
        return Estimate(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.joules + other.joules,
            _pick(np.greater_equal(self.seconds, other.seconds), self.bound, other.bound),
            self.source if self.source == other.source else "mixed",
            _add(self.d_seconds, other.d_seconds),
        )


def overlap(first: Estimate, second: Estimate) -> Estimate:
    """Both at once on different resources: the longer one sets the time and its sensitivities, resources add."""
    longer = np.greater_equal(first.seconds, second.seconds)
    keys = {**first.d_seconds, **second.d_seconds}
    return Estimate(
        np.maximum(first.seconds, second.seconds),
        first.flops + second.flops,
        first.bytes + second.bytes,
        first.joules + second.joules,
        _pick(longer, first.bound, second.bound),
        first.source if first.source == second.source else "mixed",
        {key: np.where(longer, first.d_seconds.get(key, 0.0), second.d_seconds.get(key, 0.0)) for key in keys},
    )


def _pick(condition: Any, yes: Any, no: Any) -> Any:
    if np.ndim(condition) == 0:
        return yes if condition else no
    return np.where(condition, yes, no)


def _add(first: Mapping[str, Num], second: Mapping[str, Num]) -> dict[str, Num]:
    total = dict(first)
    for key, value in second.items():
        total[key] = total[key] + value if key in total else value
    return total
