"""What `split.yaml` declares: which rows of a table were fitted, and what of it may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from perfsim.spec.base import Spec
from perfsim.spec.problems import validated
from perfsim.spec.yaml import load_yaml
from validation.compare.table import Table, where

FILE = Path(__file__).with_name("split.yaml")
Role = Literal["fitted", "fitted in another table", "kept out", "leave one out"]
ALL = "all"
NUMBER = "row number of the split"  # a column that no table has


class Rule(Spec):
    """Rows that meet all conditions, what they were to the fits, and why."""

    role: Role
    where: tuple[str, ...] = ()
    coefficients: str = ""
    why: str


class Target(Spec):
    """A bound that we want to keep, on all rows of a table or on one of its subsets."""

    metric: str
    subset: str = ""
    statistic: Literal["mape_mean", "mape_median", "mape_p90"]
    at_most: float


class Plot(Spec):
    """A panel: a scatter of measured and predicted values, or errors over a column; `by` gives colours."""

    kind: Literal["scatter", "residuals"]
    metric: str  # several are separated by commas
    by: str
    label: str
    unit: str = ""
    against: str = ""
    linear: bool = False


class Listed(Spec):
    """One table: where it comes from, what is shown of it and by which rules its rows are split."""

    folder: Literal["serving", "ops"]
    section: str
    short: str
    title: str
    licence: str
    source: str
    publish: Literal["values", "residuals"]
    run: str | None = Field(default=None, description="file of validation/measured that holds these rows")
    metrics: dict[str, str]
    groups: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    subsets: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    headline: tuple[str, ...] = Field(default=(ALL,), description="what the first table shows: subsets, or all rows")
    rules: tuple[Rule, ...] = Field(min_length=1)
    twins: str = Field(default="", description="table that holds some of these runs as well, by its stem")
    plots: tuple[Plot, ...] = ()


class Kernels(Spec):
    """A table of kernels: whether any of it was fitted, and to which coefficients."""

    role: Role
    licence: str
    why: str


class Split(Spec):
    """All tables by file stem: those of served runs, and those of kernels; `operators` are bounds on median errors."""

    tables: dict[str, Listed]
    kernels: dict[str, Kernels]
    operators: dict[Literal["held_out", "device"], float]


@cache
def split() -> Split:
    """The declared split."""
    return validated(Split, load_yaml(FILE), where=FILE.name)


def roles(table: Table, listed: Listed) -> NDArray[np.str_]:
    """The role of every row, str[rows]: that of the first rule whose conditions it meets.

    Raises InputError for a condition on a column that the table lacks, ValueError where no rule takes a row.
    """
    found = np.full(len(table), "", dtype="<U32")
    for rule in reversed(listed.rules):
        found[meeting(table, rule.where)] = rule.role
    if len(table) and not found.all():
        raise ValueError(f"{listed.section}: {int((found == '').sum())} rows meet no rule of split.yaml")
    return found


def meeting(table: Table, conditions: Sequence[str]) -> NDArray[np.intp]:
    """Numbers of the rows that meet all conditions COLUMN=VALUE; InputError for an unknown column."""
    numbered = Table(table.path, table.data.append_column(NUMBER, pa.array(range(len(table)), pa.int64())))
    return where(numbered, conditions).numbers(NUMBER).astype(np.intp)
