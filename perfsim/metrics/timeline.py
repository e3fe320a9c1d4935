"""Time series of bounded size: at most 400 equal bins whose width doubles as the horizon grows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from perfsim.metrics.quantiles import Floats

# The width starts at a fixed 2**-20 s and only doubles, so that it depends on the horizon and not on how the run was
# cut into chunks.
_FIRST_WIDTH_S = 2.0**-20
# Two consecutive segments may overlap by rounding only.
_OVERLAP = 1e-9


class Timeline:
    """Amounts (tokens, or sequences x seconds) per time bin, filled by chunks of intervals in order of time.

    `series` names the rows. An interval's amount is spread evenly over it; time between intervals counts as zero.
    """

    def __init__(self, series: tuple[str, ...], *, bins: int = 400) -> None:
        if bins < 2 or bins % 2:
            raise ValueError(f"bins must be even and at least 2, got {bins}")
        self.series = series
        self.start_s = 0.0
        self.end_s = 0.0
        self.width_s = _FIRST_WIDTH_S
        self._amounts = np.zeros((len(series), bins))
        self._empty = True

    def begin(self, at_s: float) -> None:
        """Start at a time in seconds instead of the first interval's; ValueError once there is one."""
        if not self._empty:
            raise ValueError("the timeline has begun")
        self.start_s = self.end_s = at_s
        self._empty = False

    def add(self, start: Floats, end: Floats, amounts: Floats) -> None:
        """Add intervals [start, end) in seconds with `amounts[series, interval]`.

        Raises ValueError when intervals run backwards or overlap.
        """
        if start.size == 0:
            return
        if self._empty:
            self.start_s = self.end_s = float(start[0])
            self._empty = False
        before = np.concatenate(([self.end_s], end[:-1]))
        if np.any(start < before - _OVERLAP * (1.0 + np.abs(before))) or np.any(end < start):
            raise ValueError("segments overlap or run backwards in time")
        self.end_s = max(self.end_s, float(end[-1]))
        self._widen()
        high = max(1, math.ceil((self.end_s - self.start_s) / self.width_s))
        low = max(0, math.ceil((float(start[0]) - self.start_s) / self.width_s) - 1)
        edges = self.start_s + self.width_s * np.arange(low, high + 1)
        # The amount before an edge is all of the earlier intervals and a part of the one the edge falls in; an
        # instantaneous interval on an edge belongs to the bin that ends there.
        at = np.minimum(np.searchsorted(end, edges, side="right"), end.size - 1)
        lasting = end[at] - start[at]
        part = np.clip((edges - start[at]) / np.where(lasting > 0.0, lasting, 1.0), 0.0, 1.0)
        total = np.cumsum(amounts, axis=1)
        before = np.where(at > 0, total[:, at - 1], 0.0) + amounts[:, at] * part
        # Nothing comes before the first edge and everything before the last, whatever rounding says.
        before[:, 0], before[:, -1] = 0.0, total[:, -1]
        self._amounts[:, low:high] += np.diff(before, axis=1)

    def _widen(self) -> None:
        width = self.width_s
        while self.end_s - self.start_s > self._amounts.shape[1] * width:
            width *= 2.0
        self._widen_to(width)

    def _widen_to(self, width_s: float) -> None:
        while self.width_s < width_s:
            self.width_s *= 2.0
            pairs = self._amounts[:, 0::2] + self._amounts[:, 1::2]
            self._amounts = np.concatenate((pairs, np.zeros_like(pairs)), axis=1)

    def totals(self) -> dict[str, float]:
        """The sum of each series over all bins: what went in."""
        return dict(zip(self.series, self._amounts.sum(axis=1).tolist(), strict=True))

    def rates(self) -> dict[str, Floats]:
        """Amount per second in each used bin, the last one divided by the part of it that the run covers."""
        horizon = self.end_s - self.start_s
        if horizon <= 0.0:
            return {name: np.empty(0) for name in self.series}
        # A last bin covered only by rounding error would divide noise by nothing: it joins the bin before it.
        used = max(1, math.ceil(horizon / self.width_s - 1e-9))
        amounts = self._amounts[:, :used].copy()
        amounts[:, -1] += self._amounts[:, used:].sum(axis=1)
        widths = np.full(used, self.width_s)
        widths[-1] = horizon - (used - 1) * self.width_s
        return dict(zip(self.series, amounts / widths, strict=True))


def merged(timelines: Sequence[Timeline]) -> Timeline:
    """The sum of timelines with equal series, bins and starts; one that has not begun adds nothing."""
    total = Timeline(timelines[0].series, bins=timelines[0]._amounts.shape[1])
    begun = [timeline for timeline in timelines if not timeline._empty]
    if not begun:
        return total
    if len({timeline.start_s for timeline in begun}) > 1:
        raise ValueError("timelines that start at different times cannot be added up")
    total.begin(begun[0].start_s)
    total.end_s = max(timeline.end_s for timeline in begun)
    total.width_s = max(timeline.width_s for timeline in begun)
    for timeline in begun:
        timeline._widen_to(total.width_s)
        total._amounts += timeline._amounts
    return total
