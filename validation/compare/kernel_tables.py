"""Tables of one kernel per row: the frame that fills predictions and reasons group by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from validation.compare.ask import Progress
from validation.compare.facts import InexpressibleError
from validation.compare.lowered import Floats, Rows, groups_of
from validation.compare.outcome import Outcome, Values, columns_of
from validation.compare.table import Table

Predict = Callable[[Any, Rows], Floats]
IN_US = 1e6


def compare_kernels(
    table: Table, keys: Sequence[str], predict: Predict, *, name: str = "latency_us", scale: float = IN_US
) -> tuple[Table, Outcome]:
    """Predict the column `name` for every group of rows with equal `keys`.

    `predict(values of the keys, rows)` gives seconds of each row and raises InexpressibleError for a group that has no
    prediction. Rows without a positive measured value have a reason, too.
    """
    reasons: list[str | None] = [None] * len(table)
    measured = table.numbers(name)
    for row in np.flatnonzero(~(measured > 0)):
        reasons[int(row)] = "no measured value"
    said = np.full(len(table), np.nan)
    progress = Progress(len(table), what="rows")
    for values, rows in groups_of(table, keys, measured > 0):
        try:
            said[rows] = scale * predict(values, rows)
        except InexpressibleError as missing:
            for row in rows:
                reasons[int(row)] = str(missing)
        progress.step(len(rows))
    rows = np.flatnonzero(np.isfinite(said))
    return table, Outcome(reasons, {name: columns_of(rows, measured[rows], said[rows])})


def merged(first: Outcome, second: Outcome) -> Outcome:
    """Two metrics of one table: a row is expressible when one of them is."""
    reasons = [None if a is None or b is None else a for a, b in zip(first.reasons, second.reasons, strict=True)]
    values: dict[str, Values] = {**first.values, **second.values}
    return Outcome(reasons, values)
