"""Tables of single requests: statistics of every run, measured and predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from validation.compare.ask import Ask, answers
from validation.compare.outcome import MOST_VALUES, Outcome, Pair, codes_of, outcome_of
from validation.compare.table import Table

Columns = dict[str, NDArray[np.float64]]
Runs = dict[tuple[Any, ...], NDArray[np.intp]]
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

    Groups are made of columns that have one value in each run: others say nothing about a run.
    """
    found = answers(list(questions.values()), bands=table.bands)
    columns = measured(table)
    pairs: list[Pair] = []
    for run, question in questions.items():
        answer, members = found[question], runs[run]
        if answer.refused is not None:
            for index in members:
                reasons[index] = answer.refused
            continue
        for name, source in zip(names, predicted, strict=True):
            real = columns[name][members]
            real, said = real[np.isfinite(real)], answer.requests[source]
            said = said[np.isfinite(said)]
            if not len(real) or not len(said):
                continue
            for statistic, of in STATISTICS.items():
                value = of(said)
                low, high = answer.bands.around(value, f"{source.removesuffix('_s')}.{statistic}")
                pairs.append(Pair(int(members[0]), f"{name}:{statistic}", of(real), value, low, high))
    return outcome_of(reasons, pairs, group_by=_of_whole_runs(table, runs))


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
