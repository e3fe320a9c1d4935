"""Rows of one table that are the same runs as rows of another, which may have been fitted.

aiconfigurator's sample exports from InferenceX. Runs are the same where device, engine, way of serving (prefill and
decode together or apart), lengths, clients and day are, and the mean TPOT to 0.01 ms. A row that states medians only
(the history) cannot be told by its time, so that all with an equal load on the same day count: too many rather than too
few.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare import facts, plans
from validation.compare.facts import InexpressibleError
from validation.compare.table import Table
from validation.report.split import Listed, roles, split

CLOSE_MS = 0.01  # between two values of mean TPOT; exports agree to their last digits
FROM, THERE = "kept out", "fitted"
SEEN = "fitted in another table"
Row = Mapping[str, Any]
Load = tuple[Any, ...]


def of_inferencex(row: Row) -> Load:
    """Device, engine, way of serving, lengths, clients and day of a row of InferenceX."""
    way = "disagg" if row["disagg"] else "agg"
    return (
        facts.device(row["hardware"]),
        plans.engine(row["framework"]),
        way,
        *_counts(row, "conc"),
        _day(row, "date"),
    )


def of_sample(row: Row) -> Load:
    """The same of a row of aiconfigurator's sample."""
    return (facts.device(row["system"]), plans.engine(row["backend"]), row["mode"], *_counts(row, "concurrency"),
            _day(row, "measured"))  # fmt: skip


def _counts(row: Row, clients: str) -> tuple[int, ...]:
    return tuple(plans.count(row, name) for name in ("isl", "osl", clients))


def _day(row: Row, column: str) -> str:
    if row[column] is None:
        raise InexpressibleError("no day stated")
    return str(row[column])[:10]


def twins(rows: Sequence[Row], others: Sequence[Row]) -> list[list[int]]:
    """For each row, the numbers of those rows of the sample that are the same run, or may be."""
    by_load: dict[Load, list[int]] = {}
    for number, load in enumerate(_loads(others, of_sample)):
        if load is not None and others[number]["silicon_tpot_ms"]:
            by_load.setdefault(load, []).append(number)
    found = []
    for row, load in zip(rows, _loads(rows, of_inferencex), strict=True):
        near = by_load.get(load, []) if load is not None else []
        mean = row.get("mean_tpot")
        if mean is not None:
            near = [number for number in near if abs(1e3 * mean - others[number]["silicon_tpot_ms"]) <= CLOSE_MS]
        found.append(near)
    return found


def _loads(rows: Sequence[Row], load: Callable[[Row], Load]) -> list[Load | None]:
    found: list[Load | None] = []
    for row in rows:
        try:
            found.append(load(row))
        except InexpressibleError:
            found.append(None)
    return found


def with_twins(
    of_row: NDArray[np.str_], kept: Table, other: Table, listed: Listed
) -> tuple[NDArray[np.str_], dict[str, int]]:
    """The roles of rows, of those that were fitted in the other table too, and how many have a twin there.

    Counted are rows that no fit saw by the rules of their own table: those whose time told the twin (`by time`), those
    whose load and day did (`by load`), those that are fitted there (`fitted`), and those that are unseen there as well.
    """
    there = roles(other, split().tables[listed.twins])
    pairs = twins(kept.rows(), other.rows())
    mean = kept.numbers("mean_tpot")
    changed = of_row.copy()
    counts = {"by time": 0, "by load": 0, "fitted": 0, "kept out": 0}
    for number, near in enumerate(pairs):
        if of_row[number] != FROM or not near:
            continue
        counts["by load" if np.isnan(mean[number]) else "by time"] += 1
        seen = any(there[one] == THERE for one in near)
        counts["fitted" if seen else "kept out"] += 1
        if seen:
            changed[number] = SEEN
    return changed, counts
