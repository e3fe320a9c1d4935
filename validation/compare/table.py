"""A measured table: its columns as arrays, and the rows that `--where` keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError, nearest

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one file; `path` is where it came from, so that tables that stand beside it can be found."""

    path: Path
    data: pa.Table

    @property
    def names(self) -> list[str]:
        return list(self.data.column_names)

    def __len__(self) -> int:
        return int(self.data.num_rows)

    def has(self, name: str) -> bool:
        """Whether there is such a column with at least one value in it."""
        return name in self.data.column_names and self.data[name].null_count < len(self)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric column as float64[rows], NaN for null; NaN throughout when it is missing."""
        if name not in self.data.column_names:
            return np.full(len(self), np.nan)
        import pyarrow as pa

        column = self.data[name]
        if pa.types.is_boolean(column.type):
            column = column.cast("int8")
        return np.asarray(column.cast("float64").fill_null(float("nan")).to_numpy())

    def texts(self, name: str) -> Array:
        """A text column as object[rows], None for null; None throughout when it is missing."""
        if name not in self.data.column_names:
            return np.full(len(self), None, dtype=object)
        values = self.data[name].to_pylist()
        found = np.empty(len(self), dtype=object)
        found[:] = [None if value is None else str(value) for value in values]
        return found

    def keep(self, mask: Array) -> Table:
        """The rows where `mask` holds."""
        import pyarrow as pa

        return Table(self.path, self.data.filter(pa.array(np.asarray(mask, dtype=bool))))

    def rows(self) -> list[dict[str, Any]]:
        """All rows as plain dictionaries; for tables of some thousand rows."""
        return list(self.data.to_pylist())


def read_table(path: Path) -> Table:
    """The whole file; InputError when it is no Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return Table(path, pq.read_table(path))
    except FileNotFoundError:
        raise InputError(f"--table: there is no file '{path}'") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise InputError(f"--table: '{path}' is not a readable Parquet file ({reason})") from None


def where(table: Table, conditions: Sequence[str]) -> Table:
    """The rows that meet every COLUMN=VALUE; InputError for an unknown column or a value of the wrong type."""
    for condition in conditions:
        name, equals, text = condition.partition("=")
        if not equals or not name:
            raise InputError(f"--where: expected COLUMN=VALUE, got '{condition[:80]}'")
        if name not in table.names:
            raise InputError(f"--where: no column '{name[:80]}'{nearest(name, table.names)}")
        table = table.keep(_matches(table, name, text))
    return table


def _matches(table: Table, name: str, text: str) -> Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = table.data[name]
    if text == "null":
        return np.asarray(column.is_null().to_numpy(), dtype=bool)
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    value = _parsed(kind, name, text)
    if pa.types.is_dictionary(column.type):
        column = column.cast(kind)
    equal = pc.equal(column, pa.scalar(value, type=kind))
    return np.asarray(equal.fill_null(False).to_numpy(), dtype=bool)


def _parsed(kind: pa.DataType, name: str, text: str) -> Any:
    import pyarrow as pa

    types = pa.types
    if types.is_boolean(kind):
        if text.lower() not in ("true", "false"):
            raise InputError(f"--where {name}: expected true or false, got '{text[:80]}'")
        return text.lower() == "true"
    if types.is_integer(kind):
        return _number(int, "an integer", name, text)
    if types.is_floating(kind):
        return _number(float, "a number", name, text)
    if types.is_string(kind) or types.is_large_string(kind):
        return text
    raise InputError(f"--where {name}: a column of type {kind} cannot be compared with a value")


def _number(parse: Callable[[str], Any], what: str, name: str, text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise InputError(f"--where {name}: expected {what}, got '{text[:80]}'") from None
