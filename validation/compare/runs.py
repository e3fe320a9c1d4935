"""Tables of single requests: statistics of every run, measured and predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare.ask import Ask, answers
from validation.compare.bands import Bands
from validation.compare.outcome import MOST_VALUES, Outcome, Pair, codes_of, outcome_of
from validation.compare.table import Table

Floats = NDArray[np.float64]
Columns = dict[str, Floats]
Runs = dict[tuple[Any, ...], NDArray[np.intp]]
# Engine clocks have no band of their own; what the client waits for besides is not uncertain.
BANDED = {"engine_e2e_s": "e2e"}
STATISTICS: dict[str, Callable[[NDArray[np.float64]], float]] = {
    "mean": lambda values: float(np.mean(values)),
    "p50": lambda values: float(np.quantile(values, 0.5)),
    "p99": lambda values: float(np.quantile(values, 0.99)),
}


def runs_of(table: Table, keys: Sequence[str]) -> Runs:
    """Row numbers of every run, in order of first appearance; a run is what has equal `keys`."""
    columns = [table.texts(key) for key in keys]
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, key in enumerate(zip(*columns, strict=True)):
        members.setdefault(key, []).append(index)
    return {key: np.array(rows, dtype=np.intp) for key, rows in members.items()}


def run_statistics(
    table: Table, runs: Runs, questions: Mapping[tuple[Any, ...], Ask], reasons: list[str | None], *,
    measured: Callable[[Table], Columns], predicted: Sequence[str],
    names: Sequence[str] = ("ttft_s", "tpot_s", "e2e_s"),
) -> Outcome:  # fmt: skip
    """Pairs `NAME:STATISTIC` of every run that has a question; `predicted` are the request columns to compare with.

    Rows without a positive measured value have a reason, and a run of such rows alone is not simulated.
    Groups are made of columns that have one value in each run: others say nothing about a run.
    """
    columns = {name: np.where(values > 0, values, np.nan) for name, values in measured(table).items()}
    there = np.any([np.isfinite(values) for values in columns.values()], axis=0)
    for run in questions:
        for index in runs[run][~there[runs[run]]]:
            reasons[index] = "no measured value"
    asked = {run: question for run, question in questions.items() if there[runs[run]].any()}
    found = answers(list(asked.values()), bands=table.bands)
    pairs: list[Pair] = []
    for run, question in asked.items():
        answer, members = found[question], runs[run]
        if answer.refused is not None:
            for index in members:
                reasons[index] = answer.refused
            continue
        for name, source in zip(names, predicted, strict=True):
            real = columns[name][members]
            real, said = real[np.isfinite(real)], answer.requests[source]
            said = said[np.isfinite(said)]
            if len(real) and len(said):
                path = BANDED.get(source, source.removesuffix("_s"))
                pairs += _pairs(int(members[0]), name, real, said, answer.bands, path)
    return outcome_of(reasons, pairs, group_by=_of_whole_runs(table, runs))


def _pairs(row: int, name: str, real: Floats, said: Floats, bands: Bands, path: str) -> Iterator[Pair]:
    for statistic, of in STATISTICS.items():
        value = of(said)
        low, high = bands.around(value, f"{path}.{statistic}")
        yield Pair(row, f"{name}:{statistic}", of(real), value, low, high)


def _of_whole_runs(table: Table, runs: Runs) -> tuple[str, ...]:
    first = np.zeros(len(table), dtype=np.intp)
    for members in runs.values():
        first[members] = members[0]
    columns = []
    for name in table.names:
        coded = codes_of(table, name, most=MOST_VALUES)
        if coded is not None and (coded[1] == coded[1][first]).all():
            columns.append(name)
    return tuple(columns)
