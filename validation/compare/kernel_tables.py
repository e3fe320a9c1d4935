"""Tables of one kernel per row: the frame that fills predictions and reasons group by group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perfsim.errors import PerfsimError
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
    prediction. Rows without a positive measured value have a reason, too, and so have shapes that no kernel has.
    """
    reasons: list[str | None] = [None] * len(table)
    measured = table.numbers(name)
    for row in np.flatnonzero(~(measured > 0)):
        reasons[int(row)] = "no measured value"
    said = np.full(len(table), np.nan)
    progress = Progress(len(table), what="rows")
    for values, rows in groups_of(table, keys, measured > 0):
        try:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                said[rows] = scale * _predicted(predict, dict(zip(keys, values, strict=True)), rows)
        except InexpressibleError as missing:
            for row in rows:
                reasons[int(row)] = str(missing)
        progress.step(len(rows))
    found = np.isfinite(said) & (said > 0)
    for row in np.flatnonzero(~found):
        reasons[int(row)] = reasons[int(row)] or "a size is not published, or that of no kernel"
    rows = np.flatnonzero(found)
    return table, Outcome(reasons, {name: columns_of(rows, measured[rows], said[rows])})


def _predicted(predict: Predict, values: Mapping[str, Any], rows: Rows) -> Floats:
    """InexpressibleError also for values that no kernel can have, and where one is missing that would be needed."""
    negative = [name for name, value in values.items() if isinstance(value, (int, float)) and value < 0]
    if negative:
        raise InexpressibleError(f"not modelled: a negative {negative[0]}")
    try:
        return predict(tuple(values.values()), rows)
    except (PerfsimError, ValueError, ArithmeticError, LookupError) as error:
        raise InexpressibleError(f"not modelled: {type(error).__name__} for {_shape(values)}") from error
    except (TypeError, AttributeError) as error:
        missing = [name for name, value in values.items() if value is None]
        if not missing:
            raise  # a mistake of ours
        raise InexpressibleError(f"no value of {missing[0]} published") from error


def _shape(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())[:160]


def merged(first: Outcome, second: Outcome) -> Outcome:
    """Two metrics of one table: a row is expressible when one of them is."""
    reasons = [None if a is None or b is None else a for a, b in zip(first.reasons, second.reasons, strict=True)]
    values: dict[str, Values] = {**first.values, **second.values}
    return Outcome(reasons, values)
