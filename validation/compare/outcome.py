"""What a comparison found, and its summary: one form for a table of thirty runs and for one of a million kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare.table import Table
from validation.compare.values import decoded, plain, value_text, values_of

Floats = NDArray[np.float64]
MOST_VALUES = 50  # of a column that makes groups


@dataclass(frozen=True, slots=True)
class Pair:
    """One measured value and its prediction; `low` and `high` bound the prediction where it has a band.

    `row` is the table's row whose columns describe it; for a run of many rows, the first of them.
    """

    row: int
    name: str
    measured: float
    predicted: float
    low: float = float("nan")
    high: float = float("nan")


@dataclass(frozen=True, slots=True)
class Values:
    """Pairs of one NAME as columns, float64[n] each; `rows` int[n] as for `Pair`."""

    rows: NDArray[np.intp]
    measured: Floats
    predicted: Floats
    low: Floats
    high: Floats

    def take(self, index: Any) -> Values:
        return Values(*(getattr(self, name)[index] for name in ("rows", "measured", "predicted", "low", "high")))

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Where a relative error exists."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return np.isfinite(self.predicted / self.measured) & np.isfinite(self.measured) & (self.measured > 0)


@dataclass(slots=True)
class Outcome:
    """`reasons` has one entry per row: why it cannot be expressed, None when it can.

    `values` are pairs by NAME. `group_by` limits the columns that make groups (None: all of them).
    """

    reasons: list[str | None]
    values: dict[str, Values] = field(default_factory=dict)
    group_by: tuple[str, ...] | None = None


def positive(value: Any) -> bool:
    """Whether this is a measured value: there is no relative error of one that is zero or less."""
    return value is not None and value > 0


def outcome_of(reasons: list[str | None], pairs: Iterable[Pair], *, group_by: tuple[str, ...] | None = None) -> Outcome:
    """An outcome from single pairs."""
    by_name: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_name.setdefault(pair.name, []).append(pair)
    values = {}
    for name, found in by_name.items():
        columns = (np.array([getattr(pair, key) for pair in found], dtype=np.float64)
                   for key in ("measured", "predicted", "low", "high"))  # fmt: skip
        values[name] = Values(np.array([pair.row for pair in found], dtype=np.intp), *columns)
    return Outcome(reasons, values, group_by)


def columns_of(rows: NDArray[np.intp], measured: Floats, predicted: Floats) -> Values:
    """Values without bands."""
    nothing = np.full(len(rows), np.nan)
    return Values(rows, np.asarray(measured, dtype=np.float64), np.asarray(predicted, dtype=np.float64), nothing,
                  nothing)  # fmt: skip


def report(table: Table, outcome: Outcome, *, name: str) -> dict[str, Any]:
    """The JSON of a comparison; shares are fractions, not percent."""
    counts = Counter(reason for reason in outcome.reasons if reason is not None)
    values = {key: found.take(found.usable) for key, found in outcome.values.items()}
    values = {key: values[key] for key in sorted(values) if len(values[key].rows)}
    return {
        "table": name,
        "rows": len(table),
        "expressible": len(table) - sum(counts.values()),
        "not_expressible": dict(sorted(counts.items())),
        "metrics": {key: summary(found) for key, found in values.items()},
        "groups": _groups(table, values, outcome.group_by),
    }


def summary(values: Values) -> dict[str, Any]:
    """n, errors and bands of some pairs.

    With e = predicted / measured - 1: mape_* are the mean, median and 90th percentile of |e|, `bias` is the mean of e
    (positive: predicted too slow or too much). coverage_90 is the share of measured values inside the 90% band,
    band_width_median the median of (high - low) / predicted; both None without bands.
    """
    error = values.predicted / values.measured - 1.0
    size = np.abs(error)
    banded = np.isfinite(values.low) & np.isfinite(values.high) & (values.predicted > 0)
    inside = (values.measured >= values.low) & (values.measured <= values.high)
    width = (values.high - values.low)[banded] / values.predicted[banded]
    return {
        "n": len(error),
        "mape_mean": float(size.mean()),
        "mape_median": float(np.median(size)),
        "mape_p90": float(np.quantile(size, 0.9)),
        "bias": float(error.mean()),
        "coverage_90": float(inside[banded].mean()) if banded.any() else None,
        "band_width_median": float(np.median(width)) if banded.any() else None,
    }


def _groups(table: Table, values: dict[str, Values], allowed: tuple[str, ...] | None) -> dict[str, Any]:
    """Summaries by every column of at most 50 values, measured ones too; a missing value is the group `null`."""
    groups: dict[str, Any] = {}
    for column in table.names:
        if column != "metric" and allowed is not None and column not in allowed:
            continue
        coded = codes_of(table, column, most=None if column == "metric" else MOST_VALUES)
        if coded is None:
            continue
        labels, codes = coded
        found: dict[str, Any] = {}
        for name, pairs in values.items():
            of_pair = codes[pairs.rows]
            order = np.argsort(of_pair, kind="stable")
            present, starts = np.unique(of_pair[order], return_index=True)
            for code, members in zip(present.tolist(), np.split(order, starts[1:]), strict=True):
                found.setdefault(labels[code], {})[name] = summary(pairs.take(members))
        if found:
            groups[column] = dict(sorted(found.items()))
    return groups


def codes_of(table: Table, column: str, *, most: int | None = None) -> tuple[list[str], NDArray[np.intp]] | None:
    """(texts of the distinct values, code of every row); None for lists, and for more than `most` values."""
    import pyarrow as pa

    if pa.types.is_nested(table.data[column].type):
        return None
    encoded = decoded(plain(table.data[column])).dictionary_encode().combine_chunks()
    if isinstance(encoded, pa.ChunkedArray):
        if not encoded.num_chunks:
            return None
        encoded = encoded.chunk(0)
    if most is not None and len(encoded.dictionary) > most:
        return None
    labels = [value_text(value) for value in values_of(encoded.dictionary)]
    codes = np.asarray(encoded.indices.cast("int64").fill_null(len(labels)).to_numpy(zero_copy_only=False))
    # Values of one text, as 1 and 1.0 are, are one group.
    distinct = sorted({*labels, "null"})
    place = np.array([distinct.index(label) for label in [*labels, "null"]], dtype=np.intp)
    return distinct, place[codes]
