"""Piecewise-linear curves: evaluated on arrays to explain, located at a point to fast-forward exactly."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from perfsim.ops.op import Num


class PiecewiseLinear:
    """A continuous curve through (0, y0) and growing knots, with its last slope kept beyond the last knot."""

    __slots__ = ("slopes", "x", "y")

    def __init__(self, x: Sequence[float], y: Sequence[float], *, final_slope: float) -> None:
        """`x` grows from 0; `final_slope` holds beyond x[-1]."""
        self.x = [*(float(value) for value in x), float("inf")]  # so that every piece has an end
        self.y = [float(value) for value in y]
        rises = zip(self.x, self.x[1:], self.y, self.y[1:], strict=False)  # as many as there are pairs of y
        self.slopes = [(y1 - y0) / (x1 - x0) for x0, x1, y0, y1 in rises] + [final_slope]

    def __call__(self, at: Num) -> Num:
        """Values at `at` (a float or an array), all >= 0."""
        knots = np.asarray(self.x)
        index = np.searchsorted(knots, at, side="right") - 1
        value = np.asarray(self.y)[index] + np.asarray(self.slopes)[index] * (at - knots[index])
        return float(value) if np.ndim(at) == 0 else value

    @property
    def last(self) -> float:
        """The last knot."""
        return self.x[-2]

    def locate(self, at: float) -> tuple[float, float, float]:
        """(value, slope, next knot) at `at` >= 0: the curve is y = value + slope * (x - at) up to the next knot."""
        index = bisect_right(self.x, at) - 1
        slope = self.slopes[index]
        return self.y[index] + slope * (at - self.x[index]), slope, self.x[index + 1]
