"""A measured table: its columns as arrays, and the rows that `--where` keeps."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from perfsim.errors import InputError, nearest
from validation.compare.values import plain

if TYPE_CHECKING:
    import pyarrow as pa

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of one file; `path` is where it came from, so that tables that stand beside it can be found.

    `bands` says whether bands are wanted, which most of the time goes into.
    """

    path: Path
    data: pa.Table
    bands: bool = True

    @property
    def names(self) -> list[str]:
        return list(self.data.column_names)

    def __len__(self) -> int:
        return int(self.data.num_rows)

    def has(self, name: str) -> bool:
        """Whether there is such a column with at least one value in it."""
        return name in self.data.column_names and self.data[name].null_count < len(self)

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A numeric column as float64[rows], NaN for null; NaN throughout when it is missing.

        InputError when it holds something else.
        """
        if name not in self.data.column_names:
            return np.full(len(self), np.nan)
        import pyarrow as pa

        column = plain(self.data[name])
        try:
            if pa.types.is_boolean(column.type):
                column = column.cast("int8")
            numbers = column.cast("float64", safe=False)
        except pa.ArrowException:
            raise InputError(
                f"--table: column '{name}' of '{self.path.name}' holds {column.type}, expected numbers"
            ) from None
        return np.asarray(numbers.fill_null(float("nan")).to_numpy())

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

        return replace(self, data=self.data.filter(pa.array(np.asarray(mask, dtype=bool))))

    def rows(self) -> list[dict[str, Any]]:
        """All rows as plain dictionaries; for tables of some thousand rows."""
        return list(self.data.to_pylist())


def read_table(path: Path) -> Table:
    """The whole file, NaN read as null: writers differ in which of the two stands for a missing value.

    InputError when it is no Parquet file, or one with two columns of one name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.is_dir():
        raise InputError(f"--table: '{path}' is a folder, expected a Parquet file")
    try:
        with pq.ParquetFile(path) as file:
            data = file.read()
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.glob("*.parquet")] if path.parent.is_dir() else []
        raise InputError(f"--table: there is no file '{path}'{nearest(path.name, beside)}") from None
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0].partition(". ")[0][:120]
        raise InputError(f"--table: '{path}' is not a readable Parquet file ({reason})") from None
    twice = [name for name, count in Counter(data.column_names).items() if count > 1]
    if twice:
        raise InputError(f"--table: '{path}' has more than one column '{twice[0]}'")
    return Table(path, _without_nan(_without_views(data)))


def _without_views(data: pa.Table) -> pa.Table:
    """Views of text and bytes as what they show: rows of them cannot be taken."""
    import pyarrow as pa

    for position, field in enumerate(data.schema):
        if pa.types.is_string_view(field.type) or pa.types.is_binary_view(field.type):
            kind = "large_string" if pa.types.is_string_view(field.type) else "large_binary"
            data = data.set_column(position, field.name, data[field.name].cast(kind))
    return data


def _without_nan(data: pa.Table) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc

    for position, field in enumerate(data.schema):
        if pa.types.is_floating(field.type):
            column = data[field.name]
            if pa.types.is_float16(field.type):  # has no kernels of its own
                column = column.cast("float32")
            missing = pc.is_nan(column)
            if pc.any(missing).as_py():
                column = pc.if_else(missing.fill_null(True), pa.scalar(None, column.type), column)
            data = data.set_column(position, field.name, column)
    return data


def where(table: Table, conditions: Sequence[str]) -> Table:
    """The rows that meet every COLUMN=VALUE; InputError for an unknown column or a value of the wrong type."""
    for condition in conditions:
        name, equals, text = condition.partition("=")
        if not equals or not name:
            raise InputError(f"--where: expected COLUMN=VALUE, got '{_short(condition)}'")
        if name not in table.names:
            raise InputError(f"--where: no column '{_short(name)}'{nearest(name, table.names)}")
        kept = table.keep(_matches(table, name, text))
        if len(table) and not len(kept):
            found = sorted({value for value in table.texts(name) if value is not None})
            print(f"no row has {name} = {_short(text)}{nearest(text, found)}", file=sys.stderr)
        table = kept
    return table


def _matches(table: Table, name: str, text: str) -> Array:
    import pyarrow as pa
    import pyarrow.compute as pc

    column = plain(table.data[name])
    types = pa.types
    is_text = types.is_string(column.type) or types.is_large_string(column.type) or types.is_string_view(column.type)
    if text == "null" and not is_text:
        return np.asarray(column.is_null().to_numpy(), dtype=bool)
    value = _parsed(column.type, name, text)
    if types.is_null(column.type) or value is None:
        return np.zeros(len(table), dtype=bool)
    if types.is_integer(column.type):
        column = column.cast("int64", safe=False)
    equal = pc.equal(column, pa.scalar(value, type=column.type)).fill_null(False)
    if text == "null":
        equal = pc.or_(equal, column.is_null())
    return np.asarray(equal.to_numpy(), dtype=bool)


def _parsed(kind: pa.DataType, name: str, text: str) -> Any:
    """The value of a column of this type; None for one that no such column can hold."""
    import pyarrow as pa

    types = pa.types
    if types.is_boolean(kind):
        if text.lower() not in ("true", "false"):
            raise InputError(f"--where {name}: expected true or false, got '{_short(text)}'")
        return text.lower() == "true"
    if types.is_integer(kind):
        number = _number(_integer, "an integer", name, text)
        return number if abs(number) < 2**63 else None
    if types.is_floating(kind):
        return _number(float, "a number", name, text)
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind):
        return text
    if types.is_temporal(kind) or types.is_decimal(kind):
        try:
            return pa.scalar(text).cast(kind).as_py()
        except pa.ArrowException:
            raise InputError(f"--where {name}: expected a value of type {kind}, got '{_short(text)}'") from None
    raise InputError(f"--where {name}: a column of type {kind} cannot be compared with a value")


def _integer(text: str) -> int:
    """Also of "8.0", as other columns of counts are floating."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _number(parse: Callable[[str], Any], what: str, name: str, text: str) -> Any:
    try:
        return parse(text)
    except ValueError:
        raise InputError(f"--where {name}: expected {what}, got '{_short(text)}'") from None


def _short(text: str) -> str:
    """On one line and not too long, whatever it was."""
    return " ".join(text.split())[:80]
